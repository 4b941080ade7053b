"""Run a model layer by layer on a batch: look at one layer, change it, continue with the next without a new start.

Looking at layer l of a model that changes from the bottom up would take a forward pass for each layer, though the
layers below l - 1 have not changed since. So the output of layer l - 2 is kept, and the model's own forward runs
with the layers up to that one skipped:

    embeddings, masks   0 .. l - 2   l - 1            l
    run                 skipped      run, and kept    run up to the module that is looked at

Layer l can be looked at again, also after a change, without running l - 1 again. Kept are two hidden states per
token of the batch, and nothing else of the layers passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.layers import attention_layers


class _Reached(Exception):
    """The module that is looked at has run; the rest of the forward pass is not needed."""


class Walk:
    """One batch, and how far through a model's layers it is."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        """
        Args:
            inputs: of the model, on its device.
        """
        self._model, self._inputs = model, inputs
        self._blocks = [layer.block for layer in attention_layers(model)]
        self._index = 0
        self._before: Any = None  # what block index - 2 put out
        self._last: Any = None  # what block index - 1 put out, once it has run

    def seen(self, index: int, module: nn.Module) -> tuple[Tensor, Tensor]:
        """First input and output of `module`, a part of layer `index`.

        Args:
            index: the layer asked for last, or the next one; a layer that was passed must not change any more.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def look(module: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
            found.append((args[0], output))
            raise _Reached

        self._run(index, lambda: module.register_forward_hook(look))
        return found[0]

    def before(self, index: int) -> Tensor:
        """What layer `index` gets, the residual stream; nothing of the layer runs for it."""
        found: list[Tensor] = []

        def look(block: nn.Module, args: Sequence[Tensor]) -> None:
            found.append(args[0])
            raise _Reached

        self._run(index, lambda: self._blocks[index].register_forward_pre_hook(look))
        return found[0]

    def _run(self, index: int, watch: Callable[[], RemovableHandle]) -> None:
        """Run the model up to where a hook raises `_Reached`."""
        if index == self._index + 1:
            self._index, self._before, self._last = index, self._last, None
        elif index != self._index:
            raise ValueError(f"layer {index} was asked for after layer {self._index}")

        def keep(block: nn.Module, args: Sequence[Any], output: Any) -> None:
            self._last = output

        with ExitStack() as stack:
            skipped, output = (index, self._last) if self._last is not None else (max(index - 1, 0), self._before)
            for block in self._blocks[:skipped]:
                stack.enter_context(_returning(block, output))
            if skipped < index:
                stack.callback(self._blocks[index - 1].register_forward_hook(keep).remove)
            stack.callback(watch().remove)
            stack.enter_context(evaluation_mode(self._model))
            try:
                with torch.no_grad():
                    self._model(**self._inputs)
            except _Reached:
                pass


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    """Within the context, the block returns this output and computes nothing."""
    before = block.__dict__.get("forward")
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
