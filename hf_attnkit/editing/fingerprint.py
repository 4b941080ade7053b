"""What a model was when something was computed for its heads, so that it is not applied to another one.

Noted are the running attention, numbers of heads, the modules, every parameter (the same object, never written
since), and the contents of the projections: `weight.data` can be written without PyTorch noting it, as merging
adapters does. What does not matter is not noted: `requires_grad`, training mode, hooks, other fields of the config.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.models.layers import AttentionLayer, attention_layers

PROJECTIONS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class _Noted:
    """One parameter; the reference does not keep it alive."""

    reference: weakref.ref[nn.Parameter]
    version: int | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Fingerprint:
    """A model as it is when this is made."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[AttentionLayer],
        look: Callable[[PreTrainedModel], Sequence[AttentionLayer]] = attention_layers,
    ) -> None:
        """
        Args:
            layers: what `look` gives for it.
            look: gives the layers of a model.
        """
        self._look = look
        self._running, self._numbers = _running(model, layers), [_numbers(layer) for layer in layers]
        self._modules = [[layer.module, *(getattr(layer, name) for name in PROJECTIONS)] for layer in layers]
        self._parameters = {
            name: _Noted(
                weakref.ref(parameter), _version(parameter), parameter.shape, parameter.dtype, parameter.device
            )
            for name, parameter in model.named_parameters()
        }
        self._contents = [_contents(linear) for linear in _projections(layers)]

    def require_same(self, model: PreTrainedModel) -> None:
        """Raise `ValueError`, naming what differs, if the model is not what it was."""
        if difference := self._difference(model):
            raise ValueError(f"the model is no longer what the plan was made for: {difference}; make a new plan")

    def _difference(self, model: PreTrainedModel) -> str:
        parameters = dict(model.named_parameters())
        if added := parameters.keys() ^ self._parameters.keys():
            return f"parameters were added or removed, {min(added)!r} among them"
        layers = self._look(model)
        if (running := _running(model, layers)) != self._running:
            before, now = (", ".join(dict.fromkeys(names)) for names in (self._running, running))
            return f"its attention ran {before}, and runs {now} now"
        for layer, numbers in zip(layers, self._numbers, strict=True):
            if (found := _numbers(layer)) != numbers:
                changed = [f"{name} was {old} and is {found[name]}" for name, old in numbers.items()
                           if found[name] != old]  # fmt: skip
                return f"layer {layer.index}: {', '.join(changed)}"
        for layer, modules in zip(layers, self._modules, strict=True):
            for name, old in zip(("attention", *PROJECTIONS), modules, strict=True):
                if getattr(layer, "module" if name == "attention" else name) is not old:
                    return f"layer {layer.index}: the {name} module was replaced"
        for name, noted in self._parameters.items():
            if difference := _parameter_difference(noted, parameters[name]):
                return f"the parameter {name!r} {difference}"
        names = {id(module): name for name, module in model.named_modules()}
        for linear, contents in zip(_projections(layers), self._contents, strict=True):
            if any(not torch.equal(a, b) for a, b in zip(contents, _contents(linear), strict=True)):
                return f"the parameters of {names[id(linear)]!r} were written"
        return ""


def _running(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[str]:
    """What the model's attention runs: Transformers' name for it, then the kind of each layer that was swapped."""
    kinds = [getattr(layer.module, ATTRIBUTE, None) for layer in layers]
    return [f"{model.config._attn_implementation!r}", *(str(kind) for kind in kinds if kind is not None)]


def _numbers(layer: AttentionLayer) -> dict[str, Any]:
    return {
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "rotary embedding": layer.rope,
        "norm of the keys": layer.norm,
        "without heads": layer.is_empty,
    }


def _version(parameter: nn.Parameter) -> int | None:
    """How often PyTorch saw it written; parameters made in inference mode do not count that."""
    return None if parameter.is_inference() else parameter._version


def _parameter_difference(noted: _Noted, parameter: nn.Parameter) -> str:
    if noted.reference() is not parameter:
        return "was replaced"
    for what in ("shape", "dtype", "device"):
        if getattr(parameter, what) != getattr(noted, what):
            return f"had the {what} {getattr(noted, what)} and has {getattr(parameter, what)}"
    return "was written" if _version(parameter) != noted.version else ""


def _projections(layers: Sequence[AttentionLayer]) -> list[nn.Linear]:
    """Each module once, where several projections are one."""
    modules = (getattr(layer, name) for layer in layers for name in PROJECTIONS)
    return list(dict.fromkeys(module for module in modules if module is not None))


def _contents(linear: nn.Linear) -> tuple[Tensor, ...]:
    """Exact sums of the weight's bits over rows and over columns, and the bias's bits."""
    weight = _bits(linear.weight)
    sums = weight.sum(0), weight.sum(1)
    return sums if linear.bias is None else (*sums, _bits(linear.bias).clone())


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])
