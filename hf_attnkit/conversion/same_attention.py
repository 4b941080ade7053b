"""Proof that an attention in another basis is the same attention: each module runs alone, in float32, before and after.

What a whole model puts out tells little in 16 bits: where scores are small, as in a model that is not trained, even
negated keys change it by less than its rounding. So of each attention two things are compared:

    scores    query . key, less their mean over keys where the softmax does not see it
    output    of the output projection

    | now - before |  <=  c * (| rounded - now | + eps * | now |)      largest entries

`rounded` is the attention with each new weight and bias rounded up or down by the dtype's epsilon, eps float32's, and
c that of `editing.proof`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_attnkit.editing.proof import bound_factor
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.known import transformers_attention
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.models.tensors import as_float32

EPS = torch.finfo(torch.float32).eps


class SameAttentions:
    """What attentions give before their heads get another basis."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[AttentionLayer], attentions: Sequence[Attention]
    ) -> None:
        """
        Args:
            layers: whose heads stay as many.
            attentions: of the model, found by running, with what each module was given.
        """
        by_module = {id(each.module): each for each in attentions}
        self._model = model
        self._pairs = [(layer, by_module[id(layer.module)]) for layer in layers if id(layer.module) in by_module]
        self._before = self._run()

    def difference(self) -> str:
        """What is wrong with an attention as it is now, or nothing."""
        now, rounded = self._run(), self._run(torch.Generator().manual_seed(0))
        for (layer, _), before, after, noisy in zip(self._pairs, self._before, now, rounded, strict=True):
            factor = bound_factor(next(layer.module.parameters()).dtype)
            for name, old, new, off_by in zip(("scores", "output"), before, after, noisy, strict=True):
                bound = factor * (_largest(off_by - new) + EPS * _largest(new))
                if not (off := _largest(new - old)) <= bound:
                    return (
                        f"{layer.name or f'layer {layer.index}'}: its {name} differ by {off:.1e} from what they were, "
                        f"more than {bound:.1e}, which rounding explains"
                    )
        return ""

    def _run(self, generator: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
        with quiet(self._model), transformers_attention(self._model):
            return [_alone(layer, attention, generator) for layer, attention in self._pairs]


def _alone(layer: AttentionLayer, attention: Attention, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Scores and output of an attention with its present weights, rounded by the generator's signs if there is one."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(call: Call) -> tuple[Tensor, Any]:
        output, weights = call.run()
        keys = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        scores = call.query @ keys.transpose(-1, -2)
        seen.append((scores - scores.mean(-1, keepdim=True) if layer.shifts_cancel else scores, output))
        return output, weights

    tensors: dict[str, Any] = dict(layer.module.named_parameters()) | dict(layer.module.named_buffers())
    state = {name: _rounded(x, generator) for name, x in tensors.items() if x.is_floating_point()}
    args, kwargs = as_float32(attention.inputs)
    with watched([layer.module], watch):
        functional_call(layer.module, state, args, kwargs)
    scores, output = seen[0]
    if layer.output is None:
        return scores, output
    bias = None if layer.output.bias is None else _rounded(layer.output.bias, generator)
    weight = _rounded(layer.output.weight, generator)
    return scores, F.linear(output.flatten(2), weight.T if isinstance(layer.output, Conv1D) else weight, bias)


def _rounded(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    found = tensor.detach().float()
    if generator is None or not isinstance(tensor, nn.Parameter):
        return found
    signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return found * (1 + max(EPS, torch.finfo(tensor.dtype).eps) * signs.to(found))


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
