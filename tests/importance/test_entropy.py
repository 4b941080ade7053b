"""`attention_entropy` against -sum p ln p of the whole attention matrix in float64, and in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from support.entropies import definition
from support.reference import weights
from torch import Tensor

from hf_attnkit import attention_entropy
from hf_attnkit.attention.kernels import tiles
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.benchmarking.measure import peak_bytes
from hf_attnkit.importance import online

PADDINGS = ("none", "left", "right")


def problem(queries: int, keys: int, is_causal: bool, kind: str, groups: tuple[int, int] = (6, 3)) -> tuple:
    query = torch.randn(2, groups[0], queries, 12, dtype=torch.float64)
    key = torch.randn(2, groups[1], keys, 12, dtype=torch.float64)
    mask = torch.ones(2, keys, dtype=torch.long)
    if kind != "none":
        mask[1, slice(0, keys // 3) if kind == "left" else slice(keys - keys // 3, None)] = 0
    visible = mask.bool()[:, None, None, :].expand(2, 1, queries, keys)
    if is_causal:
        i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        visible = visible & (j <= i)
    return query, key, mask, visible


def bound(dtype: torch.dtype, keys: int, query: Tensor, key: Tensor, scaling: float) -> float:
    """H = logsumexp - sum p s: both terms are at most max|s| + ln n, and each is a sum of n terms after
    a dot product of 12: a random walk of (sqrt(n) + sqrt(12)) roundings, four times for the largest."""
    scores = (query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * scaling).item()
    return 4 * torch.finfo(dtype).eps * (keys**0.5 + 12**0.5) * (scores + math.log(keys))


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (17, 17), (300, 300), (1, 40), (30, 70)], ids=str)
def test_definition(lengths: tuple[int, int], is_causal: bool, kind: str) -> None:
    """300 queries are more than one block."""
    query, key, mask, visible = problem(*lengths, is_causal, kind)
    for dtype in (torch.float64, torch.float32):
        actual = attention_entropy(
            query.to(dtype), key.to(dtype), scaling=0.7, is_causal=is_causal, attention_mask=mask
        )
        assert actual.dtype == dtype and actual.shape == (2, 6, lengths[0])
        error = (actual - definition(query.to(dtype), key.to(dtype), visible, 0.7)).abs().max()
        assert error <= bound(dtype, lengths[1], query, key, 0.7)


@pytest.mark.parametrize("groups", [(8, 8), (8, 2), (5, 1)], ids=str)
def test_groups_and_default_scaling(groups: tuple[int, int]) -> None:
    query, key, mask, visible = problem(20, 20, True, "left", groups)
    actual = attention_entropy(query, key, is_causal=True, attention_mask=mask)
    expected = definition(query, key, visible, 12**-0.5)
    assert (actual - expected).abs().max() <= bound(torch.float64, 20, query, key, 12**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Exact products of rounded inputs: no more error than float32 has."""
    query, key, mask, visible = problem(64, 300, False, "right")
    query, key = (3 * query).to(dtype), key.to(dtype)
    actual = attention_entropy(query, key, attention_mask=mask)
    assert actual.dtype == torch.float32
    error = (actual - definition(query, key, visible, 12**-0.5)).abs().max()
    assert error <= bound(torch.float32, 300, query, key, 12**-0.5)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_uniform_attention(is_causal: bool) -> None:
    """Equal scores over n keys: ln n, and 1 when normalised; a single key counts 0."""
    query, key = torch.zeros(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    mask = torch.tensor([[0, 0] + 8 * [1]])
    seen = torch.arange(10) - 1 if is_causal else torch.full((10,), 8)
    expected = seen.clamp(min=1).float().log().expand(1, 2, 10)
    arguments = {"is_causal": is_causal, "attention_mask": mask}
    eps = torch.finfo(torch.float32).eps  # logsumexp of at most 10 zeros: a few roundings of ln 10
    assert (attention_entropy(query, key, **arguments) - expected).abs().max() <= 16 * eps
    normalised = attention_entropy(query, key, **arguments, normalize=True)
    assert (normalised - (expected > 0).float()).abs().max() <= 16 * eps


def test_one_hot_attention_is_zero() -> None:
    """Scores 1,000 apart."""
    query, key = 100 * torch.eye(4).expand(1, 1, 4, 4), 10 * torch.eye(4).expand(1, 1, 4, 4)
    assert torch.equal(attention_entropy(query, key, scaling=1.0), torch.zeros(1, 1, 4))


def test_two_keys_in_closed_form() -> None:
    """p = (a, 1 - a) with a = sigmoid(score difference)."""
    query, key = torch.tensor([[[[1.0]]]], dtype=torch.float64), torch.tensor([[[[2.0], [0.5]]]], dtype=torch.float64)
    a = 1 / (1 + math.exp(-1.5))
    expected = -a * math.log(a) - (1 - a) * math.log(1 - a)
    assert abs(attention_entropy(query, key, scaling=1.0).item() - expected) < 1e-15 * 8


def test_a_query_that_sees_nothing_is_zero() -> None:
    query, key = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    for normalize in (False, True):
        result = attention_entropy(query, key, attention_mask=mask, normalize=normalize)
        assert torch.equal(result[1], torch.zeros(2, 5)) and (result[0] > 0).all()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_tile_sizes_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, mask, visible = problem(60, 60, True, "left")
    monkeypatch.setattr(online, "_FLASH", None)
    monkeypatch.setattr(tiles, "QUERY_TILE", size)
    monkeypatch.setattr(tiles, "KEY_TILE", max(size // 3, 1))
    actual = attention_entropy(query, key, scaling=0.7, is_causal=True, attention_mask=mask)
    expected = definition(query, key, visible, 0.7)
    assert (actual - expected).abs().max() <= bound(torch.float64, 60, query, key, 0.7)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [None, 5, 400], ids=str)
def test_both_ways_are_the_definition(window: int | None, is_causal: bool, kind: str, monkeypatch) -> None:
    """By the flash kernel where it can, and tile by tile; also the number of visible keys, and the largest weight."""
    query, key, padding, visible = problem(300, 300, is_causal, kind)
    distance = torch.arange(300)[:, None] - torch.arange(300)
    visible = visible & (distance.abs() < (window or 300))
    mask = Mask.aligned(300, 300, is_causal=is_causal, key_visible=padding.bool())
    expected = definition(query, key, visible, 0.7)
    p = weights(query, key[:, [0, 0, 1, 1, 2, 2]], visible, 0.7, True, None)
    assert torch.equal(online.visible_keys(mask, window).expand(2, 1, 300), visible.sum(-1))
    for dtype in (torch.float64, torch.float32):
        assert online._flash_agrees(dtype)
        limit = bound(dtype, 300, query, key, 0.7)
        for flash in (online._FLASH, None):
            monkeypatch.setattr(online, "_FLASH", flash)
            actual = online.masked_entropy(query.to(dtype), key.to(dtype), mask, 0.7, window)
            rounded = definition(query.to(dtype), key.to(dtype), visible, 0.7)
            assert (actual - rounded).abs().max() <= limit
        top = online.largest_weight(query.to(dtype), key.to(dtype), mask, 0.7, window)
        assert (top - p.amax(-1)).abs().max() <= 2 * limit  # a relative error of p as large as that of its score
        monkeypatch.undo()
    assert (expected > 1).any()


def test_large_scores_keep_their_digits() -> None:
    """Keys with a mean a hundred times their spread: without centring float32 loses 1e-2 nats here."""
    query, key, mask, visible = problem(200, 200, True, "left")
    key = key + 100
    actual = attention_entropy(query.float(), key.float(), is_causal=True, attention_mask=mask)
    expected = definition(query.float(), key.float(), visible, 12**-0.5)
    assert (actual - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("window", [None, 64], ids=["flash", "tiles"])
def test_memory_is_linear(window: int | None) -> None:
    """Twice the length, at most 2.1 times the memory; a matrix would take four times."""
    peaks = []
    for length in (1024, 2048):
        query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
        mask = Mask.aligned(length, length, is_causal=True)
        peaks.append(peak_bytes(lambda: online.masked_entropy(query, key, mask, 0.3, window), torch.device("cpu")))  # noqa: B023
    assert peaks[1] <= 2.1 * peaks[0]
