"""The tiled kernel alone: log-sum-exp, learned bias, extra keys, what it skips, memory, and dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64, gradients
from support.reference import Text, attend, weights, window
from torch import Tensor

from hf_attnkit.attention.kernels import backends, packed, tiled, tiles
from hf_attnkit.attention.kernels.tiles import Extra
from hf_attnkit.attention.kinds.flash import FlashAttention
from hf_attnkit.attention.kinds.gqa import GroupedQueryAttention
from hf_attnkit.attention.kinds.local_global import LocalGlobalAttention
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask

each_direction = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "QUERY_TILE", 16)
    monkeypatch.setattr(tiles, "WINDOW_QUERY_TILE", 8)
    monkeypatch.setattr(tiles, "KEY_TILE", 24)


def inputs(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, size: int = 6) -> list[Tensor]:
    shapes = [(2, heads, queries, size), (2, kv_heads, keys, size), (2, kv_heads, keys, size)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def padded(keys: int) -> Tensor:
    """Row 0 padded on the left, row 1 on the right."""
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[0, : keys // 4] = False
    seen[1, keys - keys // 3 :] = False
    return seen


def by_definition(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, bias: Tensor | None):
    """Output, and the log-sum-exp of a plain score matrix; rows that see nothing are 0 and -inf."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, dim=1)) * scaling
    scores = scores if bias is None else scores + bias
    output = attend(query, key, value, seen, scaling=scaling, bias=bias)
    return output, scores.masked_fill(~seen, -torch.inf).logsumexp(-1)


def both(function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of a random projection of both."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output, logsumexp = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    finite = logsumexp.isfinite()
    loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    loss = loss + (logsumexp * torch.randn(logsumexp.shape, generator=generator, dtype=torch.float64))[finite].sum()
    loss.backward()
    return [output.detach(), logsumexp.detach().masked_fill(~finite, -1e3), *(leaf.grad for leaf in leaves)]


def compare(got: list[Tensor], want: list[Tensor], terms: int) -> None:
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=terms)


@each_direction
@pytest.mark.parametrize("size", [None, 1, 5, 30, 500])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 50), (50, 50), (33, 70)], ids=str)
def test_logsumexp_and_its_gradient(lengths: tuple[int, int], size: int | None, is_causal: bool) -> None:
    """Rows that see no key among them: left padding if causal, padding wider than the window otherwise."""
    queries, keys = lengths
    mask = Mask.aligned(queries, keys, is_causal=is_causal, key_visible=padded(keys))
    seen = mask.visible().expand(2, 1, queries, keys)
    if size is not None:
        places = mask.query_position[:, :, None], mask.key_position[:, None, :]
        seen = seen & window(size, Text(*places, torch.zeros(1), torch.zeros(1), is_causal))[:, None]
    tensors = inputs(queries, keys)
    got = both(lambda q, k, v: tiled.attend(q, k, v, mask, scaling=0.4, window=size), tensors)
    compare(got, both(lambda q, k, v: by_definition(q, k, v, seen, 0.4, None), tensors), keys)


@each_direction
@pytest.mark.parametrize("shape", [(1, 4, 33, 50), (2, 4, 33, 50), (1, 1, 33, 50), (1, 4, 1, 50)], ids=str)
def test_learned_bias(shape: tuple[int, ...], is_causal: bool) -> None:
    """As T5's position bias: one for all rows of a batch, or one each; its gradient is exact."""
    mask = Mask.aligned(33, 50, is_causal=is_causal, key_visible=padded(50))
    seen = mask.visible().expand(2, 1, 33, 50)
    tensors = [*inputs(33, 50), torch.randn(shape, dtype=torch.float64)]

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        given = Mask(mask.query_position, mask.key_position, is_causal, mask.key_visible, bias=bias)
        return tiled.attend(q, k, v, given, scaling=0.4)

    compare(both(ours, tensors), both(lambda q, k, v, bias: by_definition(q, k, v, seen, 0.4, bias), tensors), 50)


def test_bias_and_a_full_matrix() -> None:
    """Any pattern, a row that sees nothing among it, and a window joined with a bias."""
    dense = torch.rand(2, 4, 33, 50) < 0.4
    dense[0, :, 7] = False
    tensors = [*inputs(33, 50), torch.randn(1, 4, 33, 50, dtype=torch.float64)]
    positions = torch.arange(17, 50)[None], torch.arange(50)[None]
    got = both(
        lambda q, k, v, b: tiled.attend(q, k, v, Mask(*positions, False, dense=dense, bias=b), scaling=0.4), tensors
    )
    compare(got, both(lambda q, k, v, b: by_definition(q, k, v, dense, 0.4, b), tensors), 50)
    near = (positions[0][0][:, None] - positions[1]).abs() < 9
    got = both(
        lambda q, k, v, b: tiled.attend(q, k, v, Mask(*positions, False, bias=b), scaling=0.4, window=9), tensors
    )
    compare(got, both(lambda q, k, v, b: by_definition(q, k, v, near[None, None], 0.4, b), tensors), 50)


@each_direction
@pytest.mark.parametrize("per_tile", [False, True], ids=["one set", "a set per tile"])
def test_extra_keys(per_tile: bool, is_causal: bool) -> None:
    """Keys outside the window, hidden ones and ones within the window among them; with gradients."""
    length, number, size = 50, 6, 4
    tile = 10 if per_tile else 0
    count = length // tile if per_tile else 1
    index = torch.stack([torch.randperm(length)[:number] for _ in range(2 * count)]).view(2, count, number)
    usable = torch.rand(2, count, number) < 0.8
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=padded(length))
    tensors = inputs(length, length)
    rows = torch.arange(2)[:, None, None]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (t[rows, :, index].permute(0, 3, 1, 2, 4) for t in (k, v))
        extra = Extra(key, value, index, usable, tile)
        return tiled.attend(q, k, v, mask, scaling=0.4, window=size, extra=extra)

    position = torch.arange(length)
    far = position[:, None] - position
    far = far >= size if is_causal else far.abs() >= size
    seen = mask.visible() & ((position[:, None] - position).abs() < size)
    seen = seen.expand(2, 1, length, length).clone()
    for row in range(2):
        for query in range(length):
            tile_number = query // tile if per_tile else 0
            for key, allowed in zip(index[row, tile_number].tolist(), usable[row, tile_number].tolist(), strict=True):
                seen[row, 0, query, key] |= bool(allowed and far[query, key])
    compare(both(ours, tensors), both(lambda q, k, v: by_definition(q, k, v, seen, 0.4, None), tensors), length)


def test_only_the_logsumexp_is_used() -> None:
    """A loss of the log-sum-exp alone: its gradient is the softmax of the scores."""
    tensors = [x.requires_grad_() for x in inputs(20, 20)]
    mask = Mask.aligned(20, 20, is_causal=True)
    tiled.attend(*tensors, mask, scaling=0.4)[1].sum().backward()
    key = tensors[1].detach().repeat_interleave(2, dim=1)
    p = weights(tensors[0].detach(), key, mask.visible(), 0.4, True, None)
    assert_exact64(tensors[0].grad, 0.4 * p @ key, terms=20)
    assert not tensors[2].grad.any()


def test_what_it_cannot_apply_is_refused() -> None:
    tensors = inputs(8, 8)
    dense = Mask.aligned(8, 8, is_causal=False).also(torch.ones(1, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="a window or a full matrix"):
        tiled.attend(*tensors, dense, scaling=1.0, window=3)
    index = torch.zeros(2, 1, 1, dtype=torch.long)
    extra = Extra(tensors[1][:, :, None, :1], tensors[2][:, :, None, :1], index, index == 0)
    with pytest.raises(ValueError, match="extra keys need a window"):
        tiled.attend(*tensors, Mask.aligned(8, 8, is_causal=True), scaling=1.0, extra=extra)


# What lies outside the pattern is never read: NaN there reaches nothing, forward or backward.

SPARSE = {
    "window": SlidingWindowAttention(6, backend="tiled"),
    "sinks": SlidingWindowAttention(6, num_sink_tokens=2),
    "global": LocalGlobalAttention(6, num_global_tokens=2),
    "random": LocalGlobalAttention(6, num_global_tokens=2, num_random_blocks=1, block_size=8),
}


def visited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scores computed by each call of the kernel's one product of queries and keys."""
    counted: list[int] = []
    original = tiles.product

    def product(query: Tensor, key: Tensor) -> Tensor:
        scores = original(query, key)
        counted.append(scores.numel())
        return scores

    monkeypatch.setattr(tiles, "product", product)
    return counted


@each_direction
@pytest.mark.parametrize("name", SPARSE)
def test_work_is_linear(name: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the length computes about twice the scores, forward and backward alike; a matrix would be four times."""
    kind = SPARSE[name]
    counted = visited(monkeypatch)
    totals = []
    for length in (256, 512):
        query, key, value = (x.requires_grad_() for x in inputs(length, length))
        mask = Mask.aligned(length, length, is_causal=is_causal)
        output = kind.attention(query, key, value, mask, scaling=0.4)[0]
        forward = sum(counted)
        output.sum().backward()
        assert sum(counted) == 2 * forward  # the backward pass computes the same tiles once more
        # At most the window on both sides, a tile of queries and the extra keys, and all keys for global queries.
        width = 2 * 6 + 8 + 2 + 8 + 16
        assert forward <= 2 * 4 * length * width
        totals.append(forward)
        counted.clear()
    assert 1.9 < totals[1] / totals[0] < 2.1


@each_direction
def test_nothing_outside_the_window_is_read(is_causal: bool) -> None:
    """NaN in the keys and values that a run of queries cannot reach leaves their results as they were."""
    length, size, reach = 128, 6, slice(60, 64)
    clean = inputs(length, length)
    spoilt = [x.clone() for x in clean]
    # Tiles of 8 queries: those of 56 to 63 touch no key before 51, and none after 68.
    for tensor in spoilt[1:]:
        tensor[:, :, : 56 - size + 1] = torch.nan
        tensor[:, :, 63 + size :] = torch.nan
    mask = Mask.aligned(length, length, is_causal=is_causal)
    results = []
    for tensors in (clean, spoilt):
        leaves = [x.requires_grad_() for x in tensors]
        output = tiled.attend(*leaves, mask, scaling=0.4, window=size)[0]
        output[:, :, reach].sum().backward()
        results.append((output[:, :, reach].detach(), leaves[0].grad[:, :, reach]))
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(other).all() and torch.equal(one, other)


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_causal_attention_skips_the_future(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = visited(monkeypatch)
    tiled.attend(*inputs(240, 240), Mask.aligned(240, 240, is_causal=name == "causal"), scaling=0.4)
    share = sum(counted) / (2 * 4 * 240 * 240)
    assert share == 1 if name == "bidirectional" else 0.5 < share < 0.55


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that a call holds at once beyond what was there before, by PyTorch's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", *SPARSE])
def test_memory_is_linear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the length takes about twice the memory, forward and backward; one matrix would take four times."""
    monkeypatch.setattr(tiles, "QUERY_TILE", 32)
    monkeypatch.setattr(tiles, "KEY_TILE", 128)
    kind = SPARSE.get(name, FlashAttention(backend="tiled"))
    peaks = []
    for length in (512, 1024):
        tensors = [x.float().requires_grad_() for x in inputs(length, length)]
        mask = Mask.aligned(length, length, is_causal=False, key_visible=padded(length))

        def both_passes(tensors: list[Tensor] = tensors, mask: Mask = mask) -> None:
            kind.attention(*tensors, mask, scaling=0.4)[0].sum().backward()

        peaks.append(peak_bytes(both_passes))
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 4 * 1024**2  # less than a single head's matrix of one row of the batch, of the 16


def test_the_record_of_memory_sees_a_matrix() -> None:
    """What the test above relies on."""
    query, key, value = (x.float() for x in inputs(1024, 1024))
    mask = Mask.aligned(1024, 1024, is_causal=True)
    assert (
        peak_bytes(lambda: GroupedQueryAttention().attention(query, key, value, mask, scaling=0.4))
        >= 2 * 4 * 4 * 1024**2
    )


DROPPING = {"flash": FlashAttention(backend="tiled"), **SPARSE}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_against_autograd_with_the_same_factors(name: str) -> None:
    """The factors are read off the kernel: with one-hot values its output is each weight as dropped.
    That it gives weights at all shows that dropout stays on the tiled kernel."""
    kind = DROPPING[name]
    length, rate = 70, 0.3
    query, key, value = inputs(length, length)
    mask = Mask.aligned(length, length, is_causal=True)

    def run(query: Tensor, key: Tensor, value: Tensor, dropout: float = rate) -> Tensor:
        torch.manual_seed(3)
        return kind.attention(query, key, value, mask, scaling=0.4, dropout=dropout)[0]

    one_hot = torch.eye(length, dtype=torch.float64).expand(2, 2, -1, -1)
    whole, dropped = (run(query, key, one_hot, dropout) for dropout in (0.0, rate))
    seen = whole > 0
    kept = torch.where(seen, dropped / whole.where(seen, 1.0), 1.0).round(decimals=3) / round(1 / (1 - rate), 3)
    assert torch.equal(kept[seen].unique(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    kept = kept / (1 - rate)
    got = gradients(run, query, key, value)
    want = gradients(lambda q, k, v: attend(q, k, v, seen, scaling=0.4, kept=kept), query, key, value)
    for actual, reference in zip(got, want, strict=True):
        # The factor 1 / (1 - rate) is made in float32: 6e-8 relative, far above float64 rounding.
        assert (actual - reference).abs().max() <= 4 * 6e-8 * max(1.0, reference.abs().max())


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_stays_on_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `backend="auto"` too, and with no other kernel beside it."""
    kind = DROPPING[name]
    monkeypatch.setattr(packed, "attention", lambda *_, **__: pytest.fail("a matrix was formed"))
    counted = visited(monkeypatch)
    kind = replace(kind, backend="auto") if hasattr(kind, "backend") else kind
    length = backends.SHORT_MATRIX + 1  # below, the automatic choice is another kernel's matrix
    kind.attention(*inputs(length, length), Mask.aligned(length, length, is_causal=True), scaling=0.4, dropout=0.3)
    assert counted


def test_tiles_draw_independently() -> None:
    """Neighbouring tiles, and neighbouring seeds, must not repeat each other's factors."""
    scores = torch.empty(1, 4, 256, 512)
    tiles = [
        tiled.kept_weights(scores, 0.5, seed, slice(q, q + 256), k).flatten()
        for seed in (0, 1, 2**31 - 2)
        for q in (0, 256)
        for k in (-1, 0, 512)
    ]
    for index, one in enumerate(tiles):
        assert set(one.unique().tolist()) == {0.0, 2.0}
        for other in tiles[:index]:
            # Independent fair bits agree on half, give or take 5 standard errors.
            agreement = (one == other).double().mean().item()
            assert abs(agreement - 0.5) <= 5 * 0.5 / one.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logsumexp_in_low_precision(dtype: torch.dtype) -> None:
    """In float32, and as accurate as that of a score matrix in the same precision."""
    query, key, value = (x.to(dtype) for x in inputs(70, 70, size=24))
    mask = Mask.aligned(70, 70, is_causal=True)
    seen = mask.visible()
    actual = tiled.attend(query, key, value, mask, scaling=0.2)[1]
    plain = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)).float() * 0.2
    plain = plain.masked_fill(~seen, -torch.inf).logsumexp(-1)
    exact = by_definition(query.double(), key.double(), value.double(), seen, 0.2, None)[1]
    assert actual.dtype == torch.float32
    # The operands are in the low precision: its eps, of the largest score, is the floor.
    error, theirs = ((x.double() - exact).abs().max() for x in (actual, plain))
    assert error <= 2 * theirs + 24**0.5 * torch.finfo(dtype).eps * exact.abs().max()
