"""What a generation behind 8,192 tokens holds at its peak, by PyTorch's own record of each tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import build
from transformers import PreTrainedModel

from hf_attnkit import swap_attention
from hf_attnkit.experiment.benchmarking.measure import peak_bytes

LENGTH, WINDOW, SINKS, LAYERS, HEADS, SIZE = 8192, 256, 4, 4, 4, 32
ALL = LAYERS * HEADS * LENGTH * 2 * SIZE * 4  # bytes of all keys and values in float32
NEAR = SINKS + WINDOW - 1
OPTIONS = {"window": WINDOW, "num_sink_tokens": SINKS}


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    options = {"head_dim": SIZE, "num_hidden_layers": LAYERS, "max_position_embeddings": LENGTH + 8}
    return build("llama", "causal", heads=HEADS, kv_heads=HEADS, hidden_size=32, intermediate_size=32, **options)


def peak(model: PreTrainedModel) -> int:
    """Of a prompt in chunks and four steps."""
    ids = torch.randint(3, 90, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 256}
    return peak_bytes(lambda: model.generate(ids, **options), torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(stock: PreTrainedModel) -> int:
    return peak(stock)


@pytest.mark.slow  # 8,192 tokens
@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("streaming_heads", {"heads": [0, 1, 3]} | OPTIONS, 0.25 + 0.75 * NEAR / LENGTH),
        ("sliding_window", {"renumber": True} | OPTIONS, NEAR / LENGTH),
    ],
    ids=["streaming heads", "sinks, renumbered"],
)  # fmt: skip
def test_the_peak_falls_with_the_cache(
    stock: PreTrainedModel, whole: int, name: str, options: dict[str, Any], kept: float
) -> None:
    """By what the cache no longer keeps. All that may be added are a block of growing memory and a chunk's tiles."""
    assert whole > ALL
    model = swap_attention(copy.deepcopy(stock), name, **options)
    tiles = 2 * HEADS * 256 * 512 * 4  # scores of a chunk with a tile of keys, twice
    assert peak(model) < kept * ALL + (whole - ALL) + tiles
