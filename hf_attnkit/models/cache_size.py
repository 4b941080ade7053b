"""How large the cache of keys and values is: from the numbers of heads, and what a cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_attnkit.models.layers import attention_layers


def cache_bytes(heads: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes of keys and values per token, for layers of `(num_key_value_heads, head_dim)`."""
    return sum(2 * number * head_dim for number, head_dim in heads) * dtype.itemsize


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that a token's keys and values take in all layers, in the model's dtype; lower is better.

    What a `DynamicCache` holds per token before a window, if there is one, is full. For an encoder,
    which keeps no cache, the size of the keys and values it computes.
    """
    layers = attention_layers(model)
    numbers = sum(layer.num_key_value_heads * (layer.head_dim + layer.value_head_dim) for layer in layers)
    return numbers * model.dtype.itemsize


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
