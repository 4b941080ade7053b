"""Attention that never calls Transformers' interface (DeBERTa, MPNet, BLOOM, Falcon, GPT-J): found by what it does.

A module attends if a softmax is taken while it runs, and it says how many heads it has. Its heads are slices of what
its output projection takes: the last matrix product inside it, or the first one outside that takes its output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_attnkit.models.attention import Attention, Inputs, is_linear
from hf_attnkit.models.tensors import cloned, tensors_in, without_caches
from hf_attnkit.models.without_heads import HEADS_LEFT

REASON = "it never calls Transformers' attention interface"
_HEADS = re.compile(r"(num_|n_)?(attention_|attn_)?(heads?)|nheads")
_SIZES = ("attention_head_size", "head_dim")
_ATTENDING = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward")


def bypassing_attentions(
    model: PreTrainedModel, inputs: Mapping[str, Any], seen: Iterable[nn.Module], start: int
) -> list[Attention]:
    """The modules that attend without the interface, in calling order.

    Args:
        inputs: under which the model runs.
        seen: modules that call the interface; they, what is in them and what they are in are no candidates.
        start: index of the first.
    """
    paths = _candidates(model, seen)
    if not paths:
        return []
    watch = _Watch(model, paths)
    with watch:
        model(**cloned(dict(inputs)))
    found: list[Attention] = []
    for path in watch.order:
        module = model.get_submodule(path)
        number, output = num_heads(module), watch.outputs.get(path)
        width = watch.widths.get(path, 0)
        if path not in watch.attending or width % number:
            continue
        size = width // number
        own = next((getattr(module, name) for name in _SIZES if type(getattr(module, name, None)) is int), size)
        if output is not None and own != size:  # what takes its heads takes something else with them (ConvBERT)
            size, output = own, None
        found.append(Attention(
            start + len(found), path, module, number, number, size, size, output=output, calls=watch.runs[path],
            calls_interface=False, reason=REASON, inputs=watch.given[path], lengths=(watch.lengths.get(path, 0), 0),
        ))  # fmt: skip
    return found


def num_heads(module: nn.Module) -> int:
    """How many heads a module says that it has; 0 where it says nothing."""
    fewest = 1 if hasattr(module, HEADS_LEFT) else 2  # what never had several need not attend by heads
    for name, value in vars(module).items():
        if type(value) is int and value >= fewest and _HEADS.fullmatch(name):
            return value
    return 0


def _candidates(model: nn.Module, seen: Iterable[nn.Module]) -> list[str]:
    """Paths of modules with heads and matrices that have no such module inside."""
    taken = {id(module) for module in seen}
    names = {path: module for path, module in model.named_modules() if num_heads(module)}
    found = []
    for path, module in names.items():
        inner = [other for other in names if other.startswith(f"{path}." if path else "") and other != path]
        mine = any(id(each) in taken for each in module.modules())
        outer = any(id(model.get_submodule(path.rsplit(".", n)[0])) in taken for n in range(1, path.count(".") + 1))
        if path and not inner and not mine and not outer and any(map(is_linear, module.modules())):
            found.append(path)
    return found


class _Watch(TorchFunctionMode):
    """One forward pass: which candidates take a softmax, what they are given, what takes their heads."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        super().__init__()
        self._model, self._hooks = model, ExitStack()
        self._running: list[str] = []
        # What came of a softmax in the module that runs: by address, storages that are kept so that no other gets it.
        self._attended: dict[int, Any] = {}
        self._waiting: dict[str, Tensor] = {}
        self.order: list[str] = []
        self.attending: set[str] = set()
        self.given: dict[str, Inputs] = {}
        self.runs: dict[str, int] = {}
        self.outputs: dict[str, str] = {}
        self.widths: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self._paths = paths

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(function, "__name__", ""), (args, kwargs or {})
        attends = bool(self._running) and name in _ATTENDING
        if attends:
            self.attending.add(self._running[-1])
        result = function(*args, **(kwargs or {}))
        if self._running and name != "__get__" and (attends or self._is_attended(given)):
            # Also what is written in place: `x.add_(...)`, `x[...] = ...`
            written = args[:1] if name.endswith("_") and args else ()
            for tensor in tensors_in((result, written)):
                storage = tensor.untyped_storage()
                self._attended[storage.data_ptr()] = storage
        return result

    def _is_attended(self, value: Any) -> bool:
        """Whether something in it came of a softmax in the module that runs."""
        return any(tensor.untyped_storage().data_ptr() in self._attended for tensor in tensors_in(list(value)))

    def __enter__(self) -> _Watch:
        for path in self._paths:
            module = self._model.get_submodule(path)
            self._hooks.callback(module.register_forward_pre_hook(self._enter(path), with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(self._leave(path)).remove)
        for path, module in self._model.named_modules():
            if is_linear(module):
                self._hooks.callback(module.register_forward_pre_hook(self._take(path)).remove)
        super().__enter__()  # type: ignore[no-untyped-call] # of torch
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call] # of torch
        self._hooks.close()

    def _enter(self, path: str) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(path)
            self._attended.clear()
            self.runs[path] = self.runs.get(path, 0) + 1
            if path not in self.given:
                self.order.append(path)
                self.given[path] = without_caches(args), without_caches(kwargs)

        return enter

    def _leave(self, path: str) -> Any:
        def leave(_: nn.Module, __: Any, result: Any) -> None:
            self._running.pop()
            tensors = tensors_in(result)
            if tensors and self.runs[path] == 1:
                self._waiting[path] = tensors[0]

        return leave

    def _take(self, linear: str) -> Any:
        def take(_: nn.Module, args: Any) -> None:
            if not args or not isinstance(args[0], Tensor):
                return
            taken = args[0]
            if self._running:
                path = self._running[-1]
                # The last that takes what came of the softmax: Longformer's later ones take new inputs.
                if linear.startswith(f"{path}.") and path in self.attending and self._is_attended([taken]):
                    self._note(path, linear, taken)
                return
            for path, output in self._waiting.items():
                if path not in self.outputs and output.shape == taken.shape and torch.equal(output, taken):
                    self._note(path, linear, taken)

        return take

    def _note(self, path: str, linear: str, taken: Tensor) -> None:
        self.outputs[path], self.widths[path] = linear, taken.shape[-1]
        self.lengths[path] = taken.shape[1] if taken.dim() > 2 else 0
