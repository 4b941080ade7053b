"""Every implementation against its definition in float64: outputs and gradients.

Lengths are chosen around the sizes the implementations work in: tiles of 256 queries and 512 keys,
of 64 queries with a window, chunks of 64 for linear. `test_tiled.py` tests the kernel alone.
"""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_exact64, gradients
from support.matrix import MATRIX, expected, run
from support.reference import weights
from torch import Tensor

from hf_attnkit.attention.kernels import linear_sums, tiles
from hf_attnkit.attention.kinds.mha import MultiHeadAttention
from hf_attnkit.attention.mask import Mask

NAMES = list(MATRIX)
PADDINGS = ("none", "left", "right")
LENGTHS = (1, 2, 17, 64, 65, 300, 600)
GROUPINGS = ((8, 8), (8, 2), (6, 3), (5, 1))


def inputs(heads: int, kv_heads: int, queries: int, keys: int, head_dim: int = 12, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + queries)
    shapes = ((batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, head_dim))
    return [1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def padding(kind: str, keys: int) -> Tensor | None:
    """Row 0 whole, row 1 with a third of its keys hidden."""
    if kind == "none":
        return None
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[1, slice(0, keys // 3) if kind == "left" else slice(keys - keys // 3, None)] = False
    return seen


def compare(name: str, tensors: list[Tensor], mask: Mask) -> None:
    got = gradients(lambda q, k, v: run(name, q, k, v, mask), *tensors)
    want = gradients(lambda q, k, v: expected(name, q, k, v, mask), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=tensors[1].shape[2])


def heads_for(name: str, heads: int = 6, kv_heads: int = 3) -> tuple[int, int]:
    return MATRIX[name].heads(heads, kv_heads)


# Each length with each padding and in each direction; each of these with each other at every second length.
EACH_LENGTH = [
    (length, kind, is_causal)
    for i, length in enumerate(LENGTHS)
    for j, kind in enumerate(PADDINGS)
    for k, is_causal in enumerate((True, False))
    if (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("length", "kind", "is_causal"), EACH_LENGTH)
@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str, length: int, kind: str, is_causal: bool) -> None:
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=padding(kind, length))
    heads = (6, 3) if length < 300 else (2, 1)
    compare(name, inputs(*heads_for(name, *heads), length, length), mask)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_groupings(name: str, grouping: tuple[int, int], is_causal: bool) -> None:
    mask = Mask.aligned(70, 70, is_causal=is_causal, key_visible=padding("left", 70))
    compare(name, inputs(*heads_for(name, *grouping), 70, 70), mask)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", [(1, 2), (1, 80), (3, 80), (70, 81), (66, 300), (260, 600)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cross_lengths(name: str, lengths: tuple[int, int], is_causal: bool) -> None:
    """A cache holds the keys before the queries."""
    queries, keys = lengths
    mask = Mask.aligned(queries, keys, is_causal=is_causal, key_visible=padding("left", keys))
    compare(name, inputs(*heads_for(name), queries, keys), mask)


@pytest.mark.parametrize("placing", [(0, 7, 40), (9, 1, 40), (9, 20, 40), (100, 70, 700)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_slots_after_the_queries(name: str, placing: tuple[int, int, int]) -> None:
    """A StaticCache has empty slots behind the queries; causality hides them."""
    offset, queries, keys = placing
    positions = torch.arange(offset, offset + queries)[None], torch.arange(keys)[None]
    mask = Mask(*positions, is_causal=True, key_visible=padding("left", keys))
    compare(name, inputs(*heads_for(name), queries, keys), mask)


@pytest.mark.parametrize("name", [name for name in NAMES if MATRIX[name].matrix and not MATRIX[name].first])
def test_rows_of_a_batch_at_different_positions(name: str) -> None:
    """With a full matrix the queries of each row of a batch may stand elsewhere in its cache."""
    queries, keys = 9, 60
    query_position = torch.stack([torch.arange(3, 12), torch.arange(40, 49)])
    key_position = torch.arange(keys)[None]
    dense = (key_position[:, None, None, :] <= query_position[:, None, :, None]).expand(2, 1, queries, keys)
    compare(name, inputs(*heads_for(name), queries, keys), Mask(query_position, key_position, True, None, dense))


@pytest.mark.parametrize("per_head", [False, True], ids=["one matrix", "matrix per head"])
@pytest.mark.parametrize("name", [name for name in NAMES if MATRIX[name].matrix and not MATRIX[name].first])
def test_full_bool_matrix(name: str, per_head: bool) -> None:
    """Any pattern, empty rows among them, comes through."""
    heads, kv_heads = heads_for(name)
    dense = torch.rand(2, heads if per_head else 1, 70, 70, generator=torch.Generator().manual_seed(3)) < 0.3
    dense[0, :, 5] = False
    mask = Mask.receive(dense, 70, 70, is_causal=False, device=torch.device("cpu"))
    compare(name, inputs(heads, kv_heads, 70, 70), mask)


@pytest.mark.parametrize("name", [name for name in NAMES if MATRIX[name].matrix and not MATRIX[name].first])
def test_full_float_matrix(name: str) -> None:
    """A float mask is added to the scores; the dtype's minimum hides."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 1, 70, 70, generator=generator, dtype=torch.float64)
    hidden = torch.rand(2, 1, 70, 70, generator=generator) < 0.5
    matrix = matrix.masked_fill(hidden, torch.finfo(torch.float64).min)
    mask = Mask.receive(matrix, 70, 70, is_causal=False, device=torch.device("cpu"))
    assert mask.bias is not None and torch.equal(mask.dense, ~hidden)
    compare(name, inputs(*heads_for(name), 70, 70), mask)


@pytest.mark.parametrize("name", [name for name in NAMES if not MATRIX[name].matrix])
def test_full_matrix_refused(name: str) -> None:
    dense = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask = Mask.receive(dense, 8, 8, is_causal=False, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"full \(queries x keys\) attention mask; pass a 2-D padding mask"):
        run(name, *inputs(4, 2, 8, 8), mask)


@pytest.mark.parametrize("name", [name for name in NAMES if MATRIX[name].first])
def test_a_full_matrix_with_a_cache_is_refused_where_the_first_token_counts(name: str) -> None:
    """The matrix does not tell where the padding ends, and with it the global tokens begin."""
    dense = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    mask = Mask.receive(dense, 3, 8, is_causal=True, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"set config\.sliding_window to None, or pass a 2-D attention_mask"):
        run(name, *inputs(4, 2, 3, 8), mask)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("length", [4, 40, 600])
@pytest.mark.parametrize("name", NAMES)
def test_queries_that_see_nothing(name: str, length: int, is_causal: bool) -> None:
    """They give exactly 0, get no gradient and spoil nobody else's."""
    seen = torch.ones(2, length, dtype=torch.bool)
    seen[1] = False
    seen[0, : length // 4] = False
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=seen)
    output, *grads = gradients(lambda q, k, v: run(name, q, k, v, mask), *inputs(*heads_for(name), length, length))
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    if is_causal:
        assert torch.equal(output[0, :, : length // 4], torch.zeros_like(output[0, :, : length // 4]))
    assert all(torch.isfinite(grad).all() and not grad[1].any() for grad in grads)
    assert all(grad[0].any() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences along random directions, with tiles and chunks so small that several are used."""
    monkeypatch.setattr(tiles, "QUERY_TILE", 3)
    monkeypatch.setattr(tiles, "WINDOW_QUERY_TILE", 3)
    monkeypatch.setattr(tiles, "KEY_TILE", 2)
    monkeypatch.setattr(linear_sums, "CHUNK", 2)
    tensors = [x.requires_grad_() for x in inputs(*heads_for(name, 4, 2), 5, 11, head_dim=3)]
    mask = Mask.aligned(5, 11, is_causal=is_causal, key_visible=padding("left", 11))
    assert torch.autograd.gradcheck(lambda q, k, v: run(name, q, k, v, mask), tensors, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_a_model(name: str) -> None:
    """Models hand over `(batch, tokens, heads, size)` transposed; strides must not matter."""
    tensors = inputs(*heads_for(name), 70, 70)
    mask = Mask.aligned(70, 70, is_causal=True)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    output = run(name, *transposed, mask)
    assert output.shape == tensors[0].shape
    assert_exact64(output, expected(name, *tensors, mask), terms=70)


def test_mha_returns_the_weights() -> None:
    query, key, value = inputs(6, 3, 17, 17)
    mask = Mask.aligned(17, 17, is_causal=True, key_visible=padding("left", 17))
    output, actual = MultiHeadAttention().attention(query, key, value, mask, scaling=0.3)
    seen = mask.visible()
    reference = weights(query, key[:, [0, 0, 1, 1, 2, 2]], seen, 0.3, True, None)
    assert_exact64(actual, reference, terms=17)
    assert_exact64(output, reference @ value[:, [0, 0, 1, 1, 2, 2]], terms=17)
