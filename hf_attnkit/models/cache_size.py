"""What a cache holds in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


def held_bytes(cache: Cache) -> int:
    """Bytes that the tensors of a cache keep in memory; of a view that is all of what it is cut from."""
    stores = [tensor.untyped_storage() for layer in cache.layers for tensor in _tensors(vars(layer).values())]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, Mapping):  # states of Mamba's layers
            yield from _tensors(value.values())
        elif isinstance(value, CacheLayerMixin):
            yield from _tensors(vars(value).values())
