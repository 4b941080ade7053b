"""An attention module run alone, in float32, on what the model gave it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_attnkit.models.attention import Attention, by_head, inputs_for
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.tensors import as_float32, tensors_in

# In float32 rounding explains a difference of a few hundred epsilons, and a wrong head is off by all of its size.
BOUND = 2**10 * torch.finfo(torch.float32).eps


class Alone:
    """Runs the module with its present parameters and looks at each head's output."""

    def __init__(self, model: nn.Module, attention: Attention, owned: Ownership) -> None:
        self._attention = attention
        self._output = None if owned.output is None else model.get_submodule(owned.output)

    def heads(self, kept: Sequence[int] | None = None) -> Tensor:
        """Each head's output, `(heads, batch, positions, size)`.

        Args:
            kept: numbers that the heads had when the attention was found; all of them by default.
        """
        attention = self._attention
        args, kwargs = as_float32(inputs_for(attention, range(attention.num_heads) if kept is None else kept))
        tensors: dict[str, Any] = dict(attention.module.named_parameters()) | dict(attention.module.named_buffers())
        state = {name: t.detach().float() for name, t in tensors.items() if t.is_floating_point()}
        found: list[Tensor] = []

        def watch(call: Call) -> tuple[Tensor, Any]:
            output, weights = call.run()
            found.append(output.permute(2, 0, 1, 3))
            return output, weights

        def take(_: nn.Module, given: tuple[Any, ...]) -> None:
            found.append(by_head(given[0], attention.value_head_dim))

        with ExitStack() as stack:
            stack.enter_context(watched([attention.module], watch))
            inside = any(module is self._output for module in attention.module.modules())
            if not attention.calls_interface and inside and self._output is not None:
                stack.callback(self._output.register_forward_pre_hook(take).remove)
            result = functional_call(attention.module, state, args, kwargs)
        return found[0] if found else by_head(tensors_in(result)[0], attention.value_head_dim)

    def difference(self, want: Tensor, kept: Sequence[int] | None = None) -> str:
        """What is wrong with the heads as they are now, or nothing; `kept` as of `heads`."""
        try:
            got = self.heads(kept)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        if got.shape != want.shape:
            return f"its heads put out {tuple(got.shape)} and not {tuple(want.shape)}"
        if torch.isfinite(got).ne(torch.isfinite(want)).any():
            return "its remaining heads are not finite where they were, or the other way round"
        off = float((got - want).abs().nan_to_num().max())
        if off > BOUND * float(want.abs().nan_to_num().max()):
            return f"its remaining heads differ from what they were by {off:.1e}"
        return ""
