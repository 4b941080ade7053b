"""Proof of a change: the pruned model must equal the uncut model with these heads' outputs zeroed.

Equal means within a bound that follows from the dtype. One rounding of each attention's output, up or down by the
dtype's epsilon, changes the model's outputs by an amount that is measured, on this model and these inputs: what its
layers make of a rounding error, larger in a deep model than in a flat one. Sums of fewer terms are added up in another
order, which changes some roundings of each layer:

    | pruned - zeroed |  <=  c * (| rounded - zeroed | + eps * | zeroed |)      largest entries, of each output

c is 64, and 4 in 16 bits, where sums are kept in float32 and rounded once. In 16 bits this sees gross faults only; each
head's own output is therefore compared in float32 first, see `alone`.

The inputs have a padded row wherever the model takes a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import quiet, run_outputs
from hf_attnkit.models.interface import Call, watched


def bound_factor(dtype: torch.dtype) -> int:
    """How many times the measured rounding a proof allows."""
    return 4 if dtype.itemsize == 2 else 64


@contextmanager
def heads_changed(
    model: nn.Module,
    attentions: Sequence[Attention],
    factors: Mapping[int, Tensor],
    outputs: Mapping[int, str | None],
) -> Iterator[None]:
    """Multiply the outputs of heads for a while.

    Args:
        factors: by the attention's index, `(num_heads,)` or `(num_heads, value_head_dim)`.
        outputs: by index, path of the output projection; for attentions that do not call the interface.
    """
    chosen = {id(each.module): each for each in attentions if each.index in factors}

    def watch(call: Call) -> tuple[Tensor, Any]:
        output, weights = call.run()
        factor = factors[chosen[id(call.module)].index].to(output)
        return output * (factor if factor.dim() == 2 else factor[:, None]), weights

    with ExitStack() as stack:
        stack.enter_context(watched([each.module for each in chosen.values() if each.calls_interface], watch))
        for each in chosen.values():
            path = outputs.get(each.index)
            if each.calls_interface or path is None:
                continue
            factor = factors[each.index]
            factor = factor if factor.dim() == 2 else factor[:, None].expand(-1, each.value_head_dim)

            def scale(module: nn.Module, args: tuple[Any, ...], factor: Tensor = factor) -> tuple[Any, ...]:
                return args[0] * factor.flatten().to(args[0]), *args[1:]

            stack.callback(model.get_submodule(path).register_forward_pre_hook(scale).remove)
        yield


def require_numbers(model: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Raise `ValueError` for outputs of NaN and infinity alone, to which all others are equal."""
    if outputs and not any(torch.isfinite(each).any() for each in outputs):
        raise ValueError(
            f"{type(model).__name__} puts out nothing but NaN or infinity, so nothing can be proven on it; look for "
            "NaN in its weights; the model is unchanged"
        )


class Zeroed:
    """What a model puts out with some heads' outputs zeroed, and how far off a cut one may be."""

    def __init__(
        self,
        model: PreTrainedModel,
        attentions: Sequence[Attention],
        removed: Mapping[int, Sequence[int]],
        inputs: Mapping[str, Any],
        outputs: Mapping[int, str | None],
    ) -> None:
        """Run the uncut model, twice.

        Args:
            removed: by the attention's index, the heads.
            inputs: of the model.
        """
        self._model, self._inputs = model, inputs
        self.outputs: list[Tensor] = []
        zero, rounded = {}, {}
        generator = torch.Generator().manual_seed(0)
        for attention in attentions:
            keep = torch.ones(attention.num_heads)
            keep[list(removed.get(attention.index, ()))] = 0
            zero[attention.index] = keep
            signs = torch.randint(0, 2, (attention.num_heads, attention.value_head_dim), generator=generator) * 2 - 1
            eps = torch.finfo(next(attention.module.parameters()).dtype).eps
            rounded[attention.index] = keep[:, None] * (
                1 + eps * signs.double()
            )  # float32 has no 1 + float64's epsilon
        with quiet(model):
            with heads_changed(model, attentions, zero, outputs):
                self._want = run_outputs(model, inputs)
            with heads_changed(model, attentions, rounded, outputs):
                noisy = run_outputs(model, inputs)
        require_numbers(model, self._want)
        self._bounds = [
            bound_factor(b.dtype) * (_largest(a - b) + torch.finfo(b.dtype).eps * _largest(b))
            if a.shape == b.shape
            else 0.0
            for a, b in zip(noisy, self._want, strict=True)
        ]

    def difference(self) -> str:
        """What is wrong with the model as it is now, or nothing; `outputs` are then what it puts out."""
        try:
            with quiet(self._model):
                got = self.outputs = run_outputs(self._model, self._inputs)
        except Exception as error:
            return f"the model does not run with fewer heads: {type(error).__name__}: {str(error)[:200]}"
        if len(got) != len(self._want):
            return f"it puts out {len(got)} tensors and not {len(self._want)}"
        for index, (a, b, bound) in enumerate(zip(got, self._want, self._bounds, strict=True)):
            if a.shape != b.shape:
                return f"output {index} has the shape {tuple(a.shape)} and not {tuple(b.shape)}"
            if torch.isfinite(a).ne(torch.isfinite(b)).any():
                return f"output {index} is not finite where that of the uncut model with these heads zeroed is"
            if (off := _largest(a - b)) > bound:
                return (
                    f"output {index} differs from that of the uncut model with these heads zeroed by {off:.1e}, "
                    f"more than {bound:.1e}, which rounding explains"
                )
        return ""


def _largest(x: Tensor) -> float:
    """The largest absolute finite entry; in parts, because logits are large and float64 is twice that."""
    parts = (part.double() for part in x.flatten().split(2**18))
    return max((float(torch.where(torch.isfinite(p), p, 0.0).abs().max()) for p in parts if p.numel()), default=0.0)
