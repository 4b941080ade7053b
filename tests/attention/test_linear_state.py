"""Generation with linear attention: a state in the place of the cache, which any split of a text leaves the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_exact64, gradients
from support.linear import (
    OPTIONS,
    compare,
    decayed,
    expected,
    features,
    generate,
    inputs,
    learned_for,
    left_of,
    maps,
    names,
    padding,
    parameters,
    run,
)

from hf_attnkit.attention.kernels import linear_sums
from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS, FeatureMap
from hf_attnkit.attention.kernels.linear_sums import LinearState
from hf_attnkit.attention.mask import Mask

pytestmark = pytest.mark.usefixtures("small_segments")


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize(
    "sizes", [[1] * 50, [50], [20, 30], [3, 1, 1, 25, 20], [26] + [1] * 24], ids=lambda s: str(s[:3])
)
@pytest.mark.parametrize("options", [{"feature_map": "elu"}, *OPTIONS], ids=str)
def test_any_split_is_one_pass(options: dict[str, Any], sizes: list[int], kind: str) -> None:
    tensors = [*inputs(4, 2, 50, 50), *learned_for(options, 4, 2)]
    seen = padding(kind, 50)
    mask = Mask.aligned(50, 50, is_causal=True, key_visible=seen)
    outputs, state = generate(options, sizes, seen, tensors)
    assert_exact64(outputs, expected(options, mask, *tensors), terms=100)

    # What is left: every real key that the next token has outside its window.
    last = min(50, max(0, 51 - options.get("window", 1)))
    of = dict(zip(names(options), tensors[3:], strict=True))
    if options["feature_map"].startswith("taylor"):  # its pairs have an order of their own
        keys = parameters(options, *tensors[:2], *tensors[3:]).key(tensors[1])
    else:
        keys = features(options["feature_map"], of, "key")(tensors[1])
    keys = keys if seen is None else keys * seen[:, None, :, None]
    if "decay.weight" in of and last:
        whole = decayed(left_of(of, tensors[1], seen)[..., :last], torch.arange(last - 1, -1, -1)[None], 0)
        keys = keys[:, :, :last] * whole[:, :, 0, :, None]
    values = torch.cat([tensors[2], torch.ones_like(tensors[2][..., :1])], dim=-1)
    sums = torch.einsum("bgkf,bgkd->bgfd", keys[:, :, :last], values[:, :, :last])
    assert_exact64(state.sums, sums, terms=50)


def test_gradients_pass_through_the_state() -> None:
    tensors = [*inputs(4, 2, 30, 30), *maps(4, 2)]
    options = {"feature_map": "hedgehog", "window": 4}
    got = gradients(lambda *t: generate(options, [11, 1, 18], None, list(t))[0], *tensors)
    want = gradients(partial(expected, options, Mask.aligned(30, 30, is_causal=True)), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=60)


@pytest.mark.parametrize("window", [None, 4])
def test_the_state_has_one_size(window: int | None) -> None:
    options = {"feature_map": "hedgehog"} | ({} if window is None else {"window": window})
    for length in (5, 80):
        tensors = [x.float() for x in (*inputs(4, 2, length, length), *maps(4, 2))]
        _, state = generate(options, [length - 1, 1], None, tensors)
        assert state.sums.shape == (2, 2, 12, 7) and state.sums.dtype == torch.float32
        half = [x.bfloat16() for x in tensors]
        whole = generate(options, [length], None, half)[1].sums
        assert whole.dtype == torch.float32
        assert whole.untyped_storage().nbytes() == whole.nbytes  # no view of the states of all chunks


@pytest.mark.parametrize("window", [None, 16])
def test_a_step_maps_one_key(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step of generation costs does not depend on the text or the window."""
    options = {"feature_map": "elu"} | ({} if window is None else {"window": window})
    tensors = inputs(2, 2, 60, 60)
    _, state = generate(options, [60], None, tensors)
    mapped = []
    original = FEATURE_MAPS["elu"].fixed
    noting = FeatureMap(fixed=lambda x: mapped.append(x.shape[2]) or original(x))
    monkeypatch.setitem(FEATURE_MAPS, "elu", noting)
    given = (window or 1) - 1
    query, key, value = inputs(2, 2, 1, given + 1)
    run(options, Mask.aligned(1, given + 1, is_causal=False), query, key, value, cache=state)
    assert sum(mapped) == 2  # the query, and the key that is new or leaves the window


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    options = {"feature_map": draw(st.sampled_from(["elu", "hedgehog", "taylor"]))}
    if window := draw(st.sampled_from([0, 1, 2, 3, 10, 39, 100])):
        options["window"] = window
    length = sum(sizes)
    seen = torch.ones(2, length, dtype=torch.bool)
    seen[0, : draw(st.integers(0, length))] = False
    seen[1, length - draw(st.integers(0, length)) :] = False
    tensors = inputs(groups * group, groups, length, length, dim=4, seed=draw(st.integers(0, 1000)))
    tensors += learned_for(options, groups * group, groups, 4)
    return options, sizes, seen, tensors


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 30), st.integers(1, 50))
def test_any_problem(problem: tuple, chunk: int, segment: int) -> None:
    options, sizes, seen, tensors = problem
    length = sum(sizes)
    before = linear_sums.CHUNK, linear_sums.SEGMENT
    try:
        linear_sums.CHUNK, linear_sums.SEGMENT = chunk, segment
        for is_causal in (True, False):
            compare(options, Mask.aligned(length, length, is_causal=is_causal, key_visible=seen), tensors)
        whole = expected(options, Mask.aligned(length, length, is_causal=True, key_visible=seen), *tensors)
        assert_exact64(generate(options, sizes, seen, tensors)[0], whole, terms=2 * length)
    finally:
        linear_sums.CHUNK, linear_sums.SEGMENT = before


@pytest.mark.parametrize(
    ("window", "queries", "keys", "is_causal", "message"),
    [
        (None, 2, 3, True, r"3 keys for 2 queries: .* at most 0 kept"),
        (4, 2, 6, True, r"6 keys for 2 queries: .* at most 3 kept"),
        (4, 3, 2, True, r"2 keys for 3 queries"),
        (None, 3, 3, False, r"a state with 3 bidirectional queries"),
    ],
)
def test_state_refused(window: int | None, queries: int, keys: int, is_causal: bool, message: str) -> None:
    state = LinearState()
    options = {"feature_map": "elu", "window": window}
    with pytest.raises(ValueError, match=message):
        mask = Mask.aligned(queries, keys, is_causal=is_causal)
        run(options, mask, *inputs(2, 2, queries, keys), cache=state)
    assert state.sums is None
