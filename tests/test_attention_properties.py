"""Property test: any shape, window and padding gives what the definition gives."""

from __future__ import annotations

import torch
from accuracy import assert_exact64, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attend, everything, window, window_and_global

from hf_attnkit.attention import flash, linear, local_global, sliding_window
from hf_attnkit.attention.mask import Mask


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, past = draw(st.integers(1, 90)), draw(st.sampled_from([0, 0, 1, 30]))
    keys = queries + past
    left, right = draw(st.integers(0, keys)), draw(st.integers(0, keys))
    is_causal = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shapes = [(2, groups * group, queries, 5), (2, groups, keys, 5), (2, groups, keys, 5)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[0, :left] = False
    seen[1, keys - right :] = False
    mask = Mask.aligned(queries, keys, is_causal=is_causal, key_visible=seen)
    i, j = mask.query_position[:, :, None], mask.key_position[:, None, :]
    visible = seen[:, None, :] & (j <= i) if is_causal else seen[:, None, :] & (j == j)
    first = torch.where(seen, j[:, 0], keys).amin(-1)[:, None, None]
    return tensors, mask, visible[:, None], (i, j, first)


def check(module, tensors, mask, visible, softmax: bool = True, **options) -> None:
    got = gradients(lambda q, k, v: module.attention(q, k, v, mask, scaling=0.7, **options)[0], *tensors)
    want = gradients(lambda q, k, v: attend(q, k, v, visible, scaling=0.7, softmax=softmax), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=tensors[1].shape[2])


examples = settings(max_examples=60, deadline=None, derandomize=True)


@examples
@given(problems(), st.integers(1, 100))
def test_sliding_window(problem: tuple, size: int) -> None:
    tensors, mask, visible, positions = problem
    check(sliding_window, tensors, mask, visible & window(size, *positions)[:, None], window=size)


@examples
@given(problems(), st.integers(1, 100), st.integers(0, 10))
def test_local_global(problem: tuple, size: int, number: int) -> None:
    tensors, mask, visible, positions = problem
    allowed = window_and_global(size, number, *positions)
    check(local_global, tensors, mask, visible & allowed[:, None], window=size, num_global_tokens=number)


@examples
@given(problems(), st.integers(1, 40), st.integers(1, 40))
def test_flash(problem: tuple, query_tile: int, key_tile: int) -> None:
    tensors, mask, visible, positions = problem
    before = flash.QUERY_TILE, flash.KEY_TILE
    try:
        flash.QUERY_TILE, flash.KEY_TILE = query_tile, key_tile
        check(flash, tensors, mask, visible & everything(*positions)[:, None])
    finally:
        flash.QUERY_TILE, flash.KEY_TILE = before


@examples
@given(problems())
def test_linear(problem: tuple) -> None:
    tensors, mask, visible, _ = problem
    check(linear, tensors, mask, visible, softmax=False)
