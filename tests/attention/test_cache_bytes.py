"""What a token adds to the cache is what the cache's tensors grow by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.models import build
from support.swapping import swapped
from transformers import DynamicCache, PreTrainedModel

from hf_attnkit import cache_bytes_per_token, describe_attention
from hf_attnkit.attention.growing_cache import BLOCK
from hf_attnkit.experiment.evaluating import describe
from hf_attnkit.models.cache_size import held_bytes
from hf_attnkit.models.layers import attention_layers

WIDE = 2 * BLOCK  # a window that the test's text does not fill


def grown(model: PreTrainedModel) -> float:
    """Bytes for each of so many tokens that a growing layer has one block more."""
    held, cache = [], DynamicCache(config=model.config)
    for ids in torch.full((1, 16 + BLOCK), 5).split(16, dim=1):
        with torch.no_grad():
            model(ids, past_key_values=cache)
        held.append(held_bytes(cache))
    return (held[-1] - held[0]) / BLOCK


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("flash", {}),
        ("linear", {"feature_map": "elu"}),
        ("linear", {"feature_map": "elu", "window": WIDE}),
        ("linear", {"feature_map": "elu", "layers": [1]}),
        ("gqa", {"cache_dtype": "int8"}),
        ("flash", {"cache_dtype": "float8_e4m3fn", "layers": [0]}),
        ("sliding_window", {"window": WIDE, "cache_dtype": "int8"}),
        ("sliding_window", {"window": 1}),
        ("streaming_heads", {"heads": [1], "window": 1, "num_sink_tokens": 0}),
    ],
)
def test_a_token_adds_what_is_said(kind: str, options: dict[str, Any]) -> None:
    model = build("llama", "causal", kv_heads=4, num_hidden_layers=2, max_position_embeddings=2 * WIDE).bfloat16()
    model = swapped(model, kind, **options)
    assert cache_bytes_per_token(model) == describe(model)["key_value_bytes_per_token"] == grown(model)
    assert describe_attention(model).bytes_per_token == grown(model)


def test_values_of_another_size_count_as_they_are() -> None:
    model = small_model("deepseek_v3")
    layers = attention_layers(model)
    assert all(layer.value_head_dim < layer.head_dim for layer in layers)
    computed = sum(layer.num_key_value_heads * (layer.head_dim + layer.value_head_dim) * 4 for layer in layers)
    assert cache_bytes_per_token(model) == describe(model)["key_value_bytes_per_token"] == computed


def test_an_encoder_counts_what_it_computes() -> None:
    model = build("bert")
    assert cache_bytes_per_token(swapped(model, "linear")) == cache_bytes_per_token(model) > 0
