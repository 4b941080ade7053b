"""Tensors inside whatever a module takes or gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of dicts, lists and tuples with each tensor changed; other objects as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(each, change) for each in value)
    if type(value) is dict:
        return {key: mapped(each, change) for key, each in value.items()}
    return value


def cloned(value: Any) -> Any:
    """A copy whose tensors may be changed in place."""
    return mapped(value, lambda tensor: tensor.detach().clone())


def is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values, of which a second run would find the first's."""
    return isinstance(value, Cache)


def without_caches(value: Any) -> Any:
    """A copy for running a module again: tensors cloned, caches `None`."""
    if is_cache(value):
        return None
    if type(value) in (list, tuple):
        return type(value)(without_caches(each) for each in value)
    if type(value) is dict:
        return {key: without_caches(each) for key, each in value.items()}
    return cloned(value)


def as_float32(value: Any) -> Any:
    """A copy, its floating-point tensors in float32 and finite: masks in float64 hold numbers that are not there."""
    limit = torch.finfo(torch.float32).max

    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        return tensor.detach().to(torch.float32, copy=True).nan_to_num(0.0, limit, -limit)

    return mapped(value, convert)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of floating point in a model's output, in order; caches are no output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if is_cache(value):
        return []
    if isinstance(value, Mapping):
        parts: Sequence[Any] = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, each.name) for each in dataclasses.fields(value)]
    else:
        parts = []
    return [tensor for part in parts for tensor in tensors_in(part)]


def first_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[int, float] | None:
    """Number of the first pair of tensors that differ in a bit, and the largest difference; NaN equals NaN."""
    if len(a) != len(b):
        return min(len(a), len(b)), float("inf")
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape:
            return index, float("inf")
        if not torch.equal(x, y) and not torch.equal(x.nan_to_num(), y.nan_to_num()):
            return index, float((x - y).abs().max())
    return None
