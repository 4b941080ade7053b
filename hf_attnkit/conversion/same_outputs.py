"""Proof that heads in another basis are the same heads: the model must put out what it did before.

Equal means within a bound that follows from the dtype. Maps that undo each other multiply the rounding of the new
weights by their condition, so that is measured: each new weight is rounded up or down by the dtype's epsilon, and

    | now - before |  <=  c * (| rounded - now | + eps * | now |)      largest entries, of each output

c is 64, and 4 in 16 bits, as in `editing.proof`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.editing.proof import bound_factor, require_numbers
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.discovery import quiet, run_outputs


class SameOutputs:
    """What a model puts out before its heads get another basis."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self._model, self._inputs = model, inputs
        self._want = self._run()
        require_numbers(model, self._want)

    def difference(self, changed: Sequence[nn.Module]) -> str:
        """What is wrong with the model as it is now, or nothing.

        Args:
            changed: the modules with new weights.
        """
        got, rounded, undo = self._run(), [], Undo()
        generator = torch.Generator().manual_seed(0)
        try:
            for module in changed:
                undo.set(module, "weight", _rounded(module.weight, generator))  # type: ignore[arg-type]
            rounded = self._run()
        finally:
            undo.back_to()
        for index, (now, before, noisy) in enumerate(zip(got, self._want, rounded, strict=True)):
            if torch.isfinite(now).ne(torch.isfinite(before)).any():
                return f"output {index} is not finite where it was, or the other way round"
            eps = _eps(now.dtype)
            bound = bound_factor(now.dtype) * (_largest(noisy - now) + eps * _largest(now))
            if not (off := _largest(now - before)) <= bound:
                return (
                    f"output {index} differs by {off:.1e} from what it was, more than {bound:.1e}, which rounding "
                    "explains"
                )
        return ""

    def _run(self) -> list[Tensor]:
        with quiet(self._model):
            return run_outputs(self._model, self._inputs)


def _rounded(weight: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    factor = 1 + _eps(weight.dtype) * signs.to(weight)
    return nn.Parameter(weight.detach() * factor, weight.requires_grad)


def _eps(dtype: torch.dtype) -> float:
    """Of a dtype; float32's for float64, since rotary embeddings are computed in float32 whatever the model's is."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _largest(x: Tensor) -> float:
    """The largest absolute entry; infinite entries that are so in both count for nothing."""
    x = x.double()
    return float(torch.where(torch.isfinite(x), x, 0.0).abs().max()) if x.numel() else 0.0
