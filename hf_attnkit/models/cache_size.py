"""How large the cache of keys and values is, from the numbers of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

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
