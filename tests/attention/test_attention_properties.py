"""Property tests: any shape, window, tokens, tiles and padding give what the definition gives."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_exact64, gradients
from support.reference import Text, attend, everything, window, window_and_global, window_and_random, window_and_sinks
from torch import Tensor

from hf_attnkit.attention.kernels import tiles
from hf_attnkit.attention.kind import Call, Kind
from hf_attnkit.attention.kinds.flash import FlashAttention
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.kinds.local_global import LocalGlobalAttention
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask

Problem = tuple[list[Tensor], Mask, Tensor, Text]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Inputs, mask, what padding and causality let be seen `(2, Q, K)`, and the text's places."""
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
    last = torch.where(seen, j[:, 0], -1).amax(-1)[:, None, None]
    return tensors, mask, visible, Text(i, j, first, last, is_causal)


def check(
    kind: Kind, problem: Problem, pattern: Any, *, softmax: bool = True, real: bool = False, **arguments: Tensor
) -> None:
    """`real`: compare the rows of real tokens alone."""
    tensors, mask, visible, text = problem
    allowed = (visible & pattern(text))[:, None]
    seen = mask.key_visible[:, None, -tensors[0].shape[2] :, None]

    def rows(output: Tensor) -> Tensor:
        return output * seen if real else output

    call = Call(arguments=arguments)
    got = gradients(lambda q, k, v: rows(kind.attention(q, k, v, mask, scaling=0.7, call=call)[0]), *tensors)
    want = gradients(lambda q, k, v: rows(attend(q, k, v, allowed, scaling=0.7, softmax=softmax)), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=tensors[1].shape[2])


def tile_sizes(queries: int, keys: int) -> Any:
    return mock.patch.multiple(tiles, QUERY_TILE=queries, WINDOW_QUERY_TILE=queries, KEY_TILE=keys)


examples = settings(max_examples=40, deadline=None, derandomize=True)
tile = st.integers(1, 40)


@examples
@given(problems(), st.integers(1, 100), tile, tile)
def test_sliding_window(problem: Problem, size: int, query_tile: int, key_tile: int) -> None:
    with tile_sizes(query_tile, key_tile):
        check(SlidingWindowAttention(size, backend="tiled"), problem, partial(window, size))


@examples
@given(problems(), st.integers(1, 40), st.integers(1, 10), tile, tile)
def test_sinks(problem: Problem, size: int, number: int, query_tile: int, key_tile: int) -> None:
    with tile_sizes(query_tile, key_tile):
        check(SlidingWindowAttention(size, number), problem, partial(window_and_sinks, size, number))


@examples
@given(problems(), st.integers(1, 100), st.integers(0, 10), tile, tile)
def test_local_global(problem: Problem, size: int, number: int, query_tile: int, key_tile: int) -> None:
    with tile_sizes(query_tile, key_tile):
        check(LocalGlobalAttention(size, number), problem, partial(window_and_global, size, number))


@examples
@given(problems(), st.data())
def test_marked_tokens(problem: Problem, data: st.DataObject) -> None:
    """Tokens that the user marks, other ones in each row."""
    tensors, mask = problem[:2]
    queries, keys = (tensor.shape[2] for tensor in tensors[:2])
    if keys != queries:
        return  # marks belong to one whole pass
    size = data.draw(st.integers(1, 30))
    marks = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * keys, max_size=2 * keys))).view(2, keys)

    def pattern(text: Text) -> Tensor:
        real = marks & mask.key_visible
        return window(size, text) | real[:, None, :] | real[:, :, None]

    with tile_sizes(data.draw(tile), data.draw(tile)):
        check(LocalGlobalAttention(size), problem, pattern, global_attention_mask=marks)


@examples
@given(problems(), st.integers(1, 30), st.integers(0, 4), st.integers(1, 4), st.integers(1, 30), st.integers(0, 9))
def test_random_blocks(problem: Problem, size: int, number: int, per_block: int, block: int, seed: int) -> None:
    pattern = partial(window_and_random, size, number, per_block, block, seed)
    check(LocalGlobalAttention(size, number, per_block, block, seed), problem, pattern, real=True)


@examples
@given(problems(), tile, tile)
def test_flash(problem: Problem, query_tile: int, key_tile: int) -> None:
    with tile_sizes(query_tile, key_tile):
        check(FlashAttention(backend="tiled"), problem, everything)


@examples
@given(problems())
def test_linear(problem: Problem) -> None:
    check(LinearAttention(), problem, everything, softmax=False)
