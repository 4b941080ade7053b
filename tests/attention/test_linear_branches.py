"""The two branches of linear attention with a window: each alone, their shares of the output, and the gate between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64, gradients
from support.linear import (
    SCALING,
    both_ways,
    compare,
    expected,
    generate,
    inputs,
    learned_for,
    padding,
    parameters,
    run,
)
from torch import Tensor

from hf_attnkit.attention.kernels.linear_hybrid import Gate
from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

pytestmark = pytest.mark.usefixtures("small_segments")
GATED: dict[str, Any] = {"feature_map": "hedgehog", "window": 7, "gate": "learned"}
TAYLOR = GATED | {"feature_map": "taylor_exponential"}


def problem(options: dict[str, Any], is_causal: bool) -> tuple[Mask, list[Tensor]]:
    mask = Mask.aligned(61, 61, is_causal=is_causal, key_visible=padding("left", 61))
    return mask, [*inputs(4, 2, 61, 61), *learned_for(options, 4, 2)]


@both_ways
@pytest.mark.parametrize("branch", ["window", "linear"])
@pytest.mark.parametrize("options", [GATED, {"feature_map": "elu", "window": 1}, TAYLOR], ids=str)
def test_one_branch_alone(options: dict[str, Any], branch: str, is_causal: bool) -> None:
    mask, tensors = problem(options, is_causal)
    options = options | {"branches": branch}
    # What the other branch learns gets no gradient here.
    got = run(options, mask, *tensors)
    assert_exact64(got, expected(options, mask, *tensors), terms=122)
    assert is_causal or got[0].all()
    if is_causal and branch == "linear":
        assert not got[0, :, : options["window"]].any() and got[0, :, options["window"] :].all()
    kind, (query, key, value, *learned) = LinearAttention(**options), tensors
    call = Call(parameters=parameters(options, query, key, *learned))
    assert_exact64(kind.of_any_length(query, key, value, mask, scaling=SCALING, call=call), got, terms=122)
    near, far = kind.parts(query, key, value, mask, scaling=SCALING, call=call)
    assert torch.equal(near if branch == "window" else far, got)
    assert not (far if branch == "window" else near).any()


@pytest.mark.parametrize("branch", ["window", "linear"])
def test_one_branch_alone_generates(branch: str) -> None:
    options = GATED | {"branches": branch}
    tensors = [*inputs(4, 2, 40, 40), *learned_for(options, 4, 2)]
    seen = padding("left", 40)
    mask = Mask.aligned(40, 40, is_causal=True, key_visible=seen)
    outputs, state = generate(options, [20, 1, 1, 18], seen, tensors)
    assert_exact64(outputs, expected(options, mask, *tensors), terms=80)
    assert (state.sums is None) == (branch == "window")  # nothing reads it


@both_ways
@pytest.mark.parametrize(
    "options", [GATED, {"feature_map": "elu", "window": 200}, {"feature_map": "elu"}, TAYLOR], ids=str
)
def test_the_shares_add_up_to_the_output(options: dict[str, Any], is_causal: bool) -> None:
    """Each is what the definition gives where the values of the other branch's keys are 0."""
    mask, (query, key, value, *learned) = problem(options, is_causal)
    call = Call(parameters=parameters(options, query, key, *learned))
    near, far = LinearAttention(**options).parts(query, key, value, mask, scaling=SCALING, call=call)
    assert_exact64(near + far, expected(options, mask, query, key, value, *learned), terms=122)
    inside = mask.distance().abs() < options.get("window", 0)
    for share, kept in ((near, inside), (far, ~inside)):
        wanted = expected(
            options, mask, query, key, value, *learned, kept_near=kept.double(), kept_far=kept.double()
        )  # fmt: skip
        assert_exact64(share, wanted, terms=122)


def test_the_gate_starts_as_none_and_a_large_one_is_one_branch() -> None:
    mask, (query, key, value, *maps, gate) = problem(GATED, True)
    tensors = query, key, value
    none = run({"feature_map": "hedgehog", "window": 7}, mask, *tensors, *maps)
    assert torch.equal(run(GATED, mask, *tensors, *maps, torch.zeros_like(gate)), none)
    for size, branch in ((500.0, "window"), (-500.0, "linear")):
        one = run(GATED, mask, *tensors, *maps, torch.full_like(gate, size))
        alone = run(GATED | {"branches": branch}, mask, *tensors, *maps, gate)
        counts = alone != 0 if branch == "linear" else torch.ones_like(alone, dtype=torch.bool)
        assert_exact64(one[counts], alone[counts], terms=122)


def test_gradients_of_the_gate_are_of_its_own_head() -> None:
    mask, tensors = problem(GATED, False)
    compare(GATED, mask, tensors)
    _, *grads = gradients(lambda *t: run(GATED, mask, *t)[:, :1], *tensors)
    assert grads[-1][0] != 0 and not grads[-1][1:].any()


def test_gate_of_other_heads_and_shares_with_a_cache_refused() -> None:
    mask, tensors = problem(GATED, True)
    query, key, value = tensors[:3]
    kind = LinearAttention(**GATED)
    plain = LinearAttention("hedgehog").create_parameters(4, 2, 6)
    with pytest.raises(ValueError, match=r"gate='learned' needs its parameters .* pass .*, gate='learned'\)\.create"):
        kind.attention(query, key, value, mask, scaling=1.0, call=Call(parameters=plain))
    plain.gate = Gate(3)
    with pytest.raises(ValueError, match=r"made for 3 query heads and there are 4; make a new one"):
        kind.attention(query, key, value, mask, scaling=1.0, call=Call(parameters=plain))
    cache = kind.create_cache(None)
    with pytest.raises(ValueError, match="give a call without a cache"):
        kind.parts(query, key, value, mask, scaling=1.0, call=Call(cache, plain))
