"""How much a token adds to the cache of keys and values: by what each layer runs, and what it keeps them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.eight_bits import SCALE_BYTES
from hf_attnkit.attention.heads_cache import HeadsLayer
from hf_attnkit.attention.kind import ATTRIBUTE, has_cache
from hf_attnkit.attention.window_cache import WindowLayer
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.layers import AttentionLayer, attention_layers


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that a token's keys and values take in the cache, in all layers; lower is better.

    In the model's dtype, or in the 8 bits of `cache_dtype` with their scales. It is what a token adds before a window,
    if there is one, is full; afterwards the window's layers do not grow. Linear attention without a window keeps no
    keys and values, and counts 0: its state has one size for all lengths. For an encoder, which keeps no cache, and a
    model that caches less and computes keys and values from it (DeepSeek's), it is the size of what is computed.
    """
    return bytes_of_layers(attention_layers(model), model.dtype)


def bytes_of_layers(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> int:
    """As `cache_bytes_per_token`, of these layers of a model in this dtype."""
    return sum(bytes_of_attention(layer.attention, layer.num_key_value_heads, dtype) for layer in layers)


def bytes_of_attention(attention: Attention, num_key_value_heads: int, dtype: torch.dtype) -> int:
    """The same of one attention with so many key/value heads."""
    sizes = attention.head_dim, attention.value_head_dim
    layer = None
    if attention.is_causal and not attention.is_cross and has_cache(attention.module):
        layer = getattr(attention.module, ATTRIBUTE).create_cache(None)
    if layer is None:
        return num_key_value_heads * sum(sizes) * dtype.itemsize
    of_a_head = sum(size * dtype.itemsize if layer.cache_dtype is None else size + SCALE_BYTES for size in sizes)
    return _kept(layer, num_key_value_heads) * of_a_head


def _kept(layer: SequenceLayer, heads: int) -> int:
    """Of how many of the heads the layer keeps tokens."""
    if isinstance(layer, HeadsLayer):
        near = len(layer.heads)
        return _kept(layer.far, heads - near) + _kept(layer.near, near)
    if isinstance(layer, WindowLayer) and layer.window == 1 and not layer.num_sink_tokens:
        return 0
    return heads
