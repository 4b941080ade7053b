"""Run a model layer by layer on a batch: look at one layer, change it, continue with the next without a new start.

Looking at layer l of a model that changes from the bottom up would take a forward pass for each layer, though the
layers below l - 1 have not changed since. So the output of layer l - 2 is kept, and the model's own forward runs
with the blocks up to that one skipped:

    embeddings, masks   0 .. l - 2   l - 1            l
    run                 skipped      run, and kept    run up to the module that is looked at

Layer l can be looked at again, also after a change, without running l - 1 again. Kept are two hidden states per
token of the batch, one more for each other list of blocks (an encoder's last output), and nothing else of the layers
passed.

That a block takes what the one before it gave, and nothing else of the blocks, is proven on the model: see `can_skip`.
Where it is not so, the model runs from the start for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.layers import AttentionLayer, attention_layers, in_running_order
from hf_attnkit.models.tensors import cloned, tensors_in


class _Reached(Exception):
    """The module that is looked at has run; the rest of the forward pass is not needed."""


class Seen(NamedTuple):
    """What a module was seen to do; calls of one forward pass one after the other along the batch.

    Attributes:
        taken, output: its first input, and what it put out.
        stream: what its output is added to, the residual stream; `None` where that cannot be told.
    """

    taken: Tensor
    output: Tensor
    stream: Tensor | None = None


class Walk:
    """One batch, and how far through a model's layers it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        layers: Sequence[AttentionLayer] | None = None,
        *,
        skips: bool = True,
    ) -> None:
        """
        Args:
            inputs: of the model, on its device.
            layers: of the model; by default `attention_layers`. They are walked as of `in_running_order`.
            skips: whether layers that were passed do not run again, see `can_skip`.
        """
        self._model, self._inputs, self._skips = model, inputs, skips
        layers = in_running_order(attention_layers(model) if layers is None else layers)
        self._layers = {layer.index: layer for layer in layers}
        self._blocks = list({id(layer.block): layer.block for layer in layers}.values())
        self._numbers = {id(block): number for number, block in enumerate(self._blocks)}
        self._lists = _lists(model, self._blocks)
        self._index = 0
        self._kept: dict[int, Any] = {}  # by list, what its last block below index - 1 put out
        self._last: Any = None  # what block index - 1 put out, once it has run

    def seen(self, index: int, module: nn.Module, *, stream: bool = False, grad: bool = False) -> Seen:
        """What `module`, a part of layer `index`, takes and puts out.

        Args:
            index: the layer asked for last, or the next one to run; a layer that was passed must not change any more.
            stream: whether to look for the residual stream too.
            grad: whether the output has a graph.
        """
        found: list[tuple[Tensor, Tensor]] = []
        layer = self._layers[index]
        again = layer.attention.calls > 1
        adds = _Adds() if stream and not again else None

        def look(module: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
            if adds is None and not again:
                found.append((args[0], output))
                raise _Reached
            found.append((args[0].clone(), output.clone()))  # the forward pass goes on, and may add in place
            if adds is not None:
                adds.output = output

        with ExitStack() as stack:
            if adds is not None:
                stack.callback(layer.block.register_forward_hook(adds.leave).remove)
                stack.enter_context(adds)
            self._run(layer, lambda: module.register_forward_hook(look), grad=grad)
        if not found:
            raise ValueError(f"{layer.name} does not run on a calibration batch; leave the batch out")
        if len(found) == 1:
            return Seen(*found[0], None if adds is None else adds.stream)
        return Seen(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _run(self, layer: AttentionLayer, watch: Callable[[], RemovableHandle], *, grad: bool = False) -> None:
        """Run the model up to where a hook raises `_Reached`."""
        with ExitStack() as stack:
            if self._skips:
                self._skip(self._numbers[id(layer.block)], layer, stack)
            stack.callback(watch().remove)
            stack.enter_context(evaluation_mode(self._model))
            try:
                with torch.set_grad_enabled(grad):
                    self._model(**self._inputs)
            except _Reached:
                pass

    def _skip(self, index: int, layer: AttentionLayer, stack: ExitStack) -> None:
        """Let the blocks that were passed return what they put out."""
        if index == self._index + 1:
            if self._last is not None:
                self._kept[self._lists[index - 2]] = self._last
            self._index, self._last = index, None
        elif index != self._index:
            raise ValueError(f"{layer.name} was asked for after block {self._index}")

        def keep(block: nn.Module, args: Sequence[Any], output: Any) -> None:
            self._last = cloned(output)  # the next block may add to it in place

        kept, skipped = self._kept, max(index - 1, 0)
        if self._last is not None:
            kept, skipped = kept | {self._lists[index - 1]: self._last}, index
        for number in range(skipped):
            stack.enter_context(_returning(self._blocks[number], kept[self._lists[number]]))
        if skipped < index:
            stack.callback(self._blocks[index - 1].register_forward_hook(keep).remove)


def can_skip(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], inputs: Mapping[str, Any], *, stream: bool = False
) -> bool:
    """Whether walking gives what whole forward passes give: the inputs of all output projections, bit for bit.

    Args:
        stream: whether the walk looks for the residual stream too.
    """
    if any(layer.attention.calls > 1 for layer in layers):
        return False
    whole: dict[int, list[Tensor]] = {}

    def note(index: int) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            whole[index] = _digest(args[0])

        return look

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.output.register_forward_pre_hook(note(layer.index)).remove)
        stack.enter_context(evaluation_mode(model))
        with torch.no_grad():
            model(**inputs)
    walk = Walk(model, inputs, layers)
    try:
        for layer in in_running_order(layers):
            walked = _digest(walk.seen(layer.index, layer.output, stream=stream).taken)
            if not all(map(torch.equal, walked, whole[layer.index])):
                return False
    except Exception:  # whatever a forward says whose blocks do not run, it cannot be walked
        return False
    return True


def _digest(x: Tensor) -> list[Tensor]:
    """Exact sums of a tensor's bits over its features and over its positions."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().contiguous().view(integers[x.element_size()]).flatten(0, -2)
    return [bits.sum(0), bits.sum(1)]


def _lists(model: nn.Module, blocks: Sequence[nn.Module]) -> list[int]:
    """For each block, which list of modules it is in; one of its own where it is in none."""
    parents = {id(child): id(each) for each in model.modules() if isinstance(each, nn.ModuleList) for child in each}
    return [parents.get(id(block), id(block)) for block in blocks]


class _Adds(TorchFunctionMode):
    """Watches what a module's output is added to.

    Several terms may be added one after the other (a parallel MLP's output, then the stream): all count that are added
    to the sum before anything else is done with it.
    """

    _ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
    _NOTHING = frozenset({"__get__", "dropout", "size", "dim"})

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None
        self.stream: Tensor | None = None
        self._sum: Tensor | None = None
        self._left = False

    def leave(self, *_: Any) -> None:
        """The block has run: what adds its output comes next, or nothing does."""
        self._left = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if self.output is None or name in self._NOTHING:
            return function(*args, **kwargs)
        own = self.output if self._sum is None else self._sum
        other = _other(own, args) if name in self._ADDS and not kwargs else None
        if other is None:
            # Only where tensors are worked on: what sets PyTorch's modes must set them back on the way out.
            if (self._sum is not None or self._left) and tensors_in((*args, *kwargs.values())):
                raise _Reached
            return function(*args, **kwargs)
        with torch.no_grad():
            other = other.detach().clone().reshape(self.output.shape)
            self.stream = other if self.stream is None else self.stream + other
        self._sum = function(*args, **kwargs)
        return self._sum


def _other(own: Tensor, operands: Sequence[Any]) -> Tensor | None:
    """The other of two operands, where one is `own` or a view of all of it."""
    if len(operands) != 2 or not all(isinstance(each, Tensor) and each.numel() == own.numel() for each in operands):
        return None
    pairs: list[tuple[Tensor, Tensor]] = [(operands[0], operands[1]), (operands[1], operands[0])]
    for one, other in pairs:
        if one.data_ptr() == own.data_ptr() and one.shape == other.shape and one.is_contiguous():
            return other
    return None


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    """Within the context, the block returns this output and computes nothing."""
    before = block.__dict__.get("forward")
    block.forward = lambda *args, **kwargs: cloned(output)
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
