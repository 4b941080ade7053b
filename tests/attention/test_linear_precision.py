"""Linear attention in float32, bfloat16 and float16, and its dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate, gradients
from support.linear import OPTIONS, both_ways, every_option, expected, inputs, learned_for, maps, padding, run
from support.reference import phi
from torch import Tensor

from hf_attnkit.attention.kernels.feature_maps.elu import elu
from hf_attnkit.attention.kernels.linear_sums import LinearState
from hf_attnkit.attention.mask import Mask

pytestmark = pytest.mark.usefixtures("small_segments")


@both_ways
@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_option
def test_error_against_float64(options: dict[str, Any], dtype: torch.dtype, scale: float, is_causal: bool) -> None:
    """At most twice the error of the definition computed in the same precision; its e^s must fit float16."""
    tensors = [(scale * x).to(dtype) for x in inputs(6, 3, 90, 90)] + [x.to(dtype) for x in learned_for(options, 6, 3)]
    mask = Mask.aligned(90, 90, is_causal=is_causal, key_visible=padding("left", 90))
    ours = gradients(partial(run, options, mask), *tensors)
    theirs = gradients(partial(expected, options, mask), *tensors)
    exact = gradients(partial(expected, options, mask), *(x.double() for x in tensors))
    for actual, plain, truth in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(actual, plain, truth, terms=12)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_option
def test_large_scores(options: dict[str, Any], dtype: torch.dtype, is_causal: bool) -> None:
    """Scores near 1,000, features near 0 and hidden rows: finite, gradients too."""
    tensors = [(25 * x).to(dtype) for x in inputs(4, 2, 60, 60)] + [x.to(dtype) for x in learned_for(options, 4, 2)]
    seen = padding("left", 60)
    seen[0] = False
    mask = Mask.aligned(60, 60, is_causal=is_causal, key_visible=seen)
    for result in gradients(partial(run, options, mask), *tensors):
        assert result.dtype == dtype and torch.isfinite(result).all()


def test_very_negative_scores_in_a_window() -> None:
    """All e^s below the smallest float, and no key beyond the window: still the softmax of the window."""
    query, key, value = (x.float() for x in inputs(1, 1, 4, 4))
    query, key = torch.full_like(query, 20.0), torch.full_like(key, -20.0)
    output = run({"feature_map": "elu", "window": 4}, Mask.aligned(4, 4, is_causal=True), query, key, value)
    means = value.cumsum(2) / torch.arange(1, 5)[:, None]
    assert (output - means).abs().max() <= 4 * torch.finfo(torch.float32).eps * value.abs().max()


def test_a_normaliser_too_small_to_divide_by() -> None:
    """Features whose products leave float32: no key, rather than infinite gradients."""
    query, key, value = (x.float() for x in inputs(1, 1, 4, 4))
    query, key = torch.full_like(query, -50.0), torch.full_like(key, -45.0)
    mask = Mask.aligned(4, 4, is_causal=True)
    output, *grads = gradients(partial(run, {"feature_map": "elu"}, mask), query, key, value)
    assert not output.any() and all(torch.isfinite(grad).all() for grad in grads)


def test_elu_keeps_small_features() -> None:
    """e^x of a negative x to all digits, which elu(x) + 1 in float32 has lost at -20."""
    x = torch.linspace(-60, 5, 200)
    features = elu(x).double()
    assert ((features - phi(x.double())) / phi(x.double())).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("options", [{"feature_map": "elu"}, *OPTIONS[:2]], ids=str)
def test_mixed_precision_keeps_the_sums_in_float32(options: dict[str, Any]) -> None:
    tensors = [x.bfloat16().float() for x in (*inputs(4, 2, 60, 60), *learned_for(options, 4, 2))]
    mask = Mask.aligned(60, 60, is_causal=True)
    query, key, value, *learned = tensors
    state, plain_state = LinearState(), LinearState()
    run(options, mask, query, key, value, *learned, cache=plain_state)
    with torch.autocast("cpu", torch.bfloat16):
        run(options, mask, query, key, value, *learned, cache=state)
    assert torch.equal(state.sums, plain_state.sums)


# Dropout.


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_dropout_mean_is_the_undropped_output(options: dict[str, Any]) -> None:
    """The largest of 320 deviations stays below 5 standard errors but once in 5,000 suites (seed fixed)."""
    tensors = [*inputs(2, 1, 10, 10, dim=4), *learned_for(options, 2, 1, 4)]
    mask = Mask.aligned(10, 10, is_causal=True, key_visible=padding("left", 10))
    draws = torch.stack([run(options, mask, *tensors, dropout=0.3) for _ in range(600)])
    exact = expected(options, mask, *tensors)
    bound = 5 * draws.std(0) / 600**0.5
    assert ((draws.mean(0) - exact).abs() <= bound + 1e-12).all()
    assert bound[exact.abs() > 0.1].mean() < 0.3 * exact.abs()[exact.abs() > 0.1].mean()  # the bound means something


@both_ways
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "taylor"])
def test_dropout_drops_far_values_for_all_queries_and_near_weights_one_by_one(
    feature_map: str, is_causal: bool
) -> None:
    """With one-hot values the output is the dropped weight: 0, or the undropped one over 1 - p."""
    length, p, window = 50, 0.4, 6
    options = {"feature_map": feature_map, "window": window}
    query, key, _ = inputs(2, 1, length, length)
    value = torch.eye(length, dtype=torch.float64).expand(2, 1, length, length)
    mask = Mask.aligned(length, length, is_causal=is_causal)
    tensors = [query, key, value, *learned_for(options, 2, 1)]
    whole = run(options, mask, *tensors)
    ratio = run(options, mask, *tensors, dropout=p) / torch.where(whole > 0, whole, 1.0)
    kept = ratio > 0.5
    # 1 / (1 - p) is made in float32.
    assert ((ratio - kept / (1 - p)).abs() < 1e-6).all()

    distance = torch.arange(length)[:, None] - torch.arange(length)
    near, far = distance.abs() < window, distance >= window
    far = far if is_causal else far | (distance <= -window)
    near = near & (distance >= 0) if is_causal else near
    columns = [kept[:, :, far[:, j], j].flatten(1) for j in range(length) if far[:, j].any()]
    # One draw for all queries and heads of a column, another for each row of the batch.
    assert all((column == column[:, :1]).all() for column in columns)
    draws = torch.stack([column[:, 0] for column in columns]).double()
    assert abs(draws.mean() - (1 - p)) <= 5 * (p * (1 - p) / draws.numel()) ** 0.5
    draws = kept[:, :, near].double()
    assert abs(draws.mean() - (1 - p)) <= 5 * (p * (1 - p) / draws.numel()) ** 0.5
    assert draws.std(-1).min() > 0


@pytest.mark.slow
@both_ways
def test_dropout_backward_uses_the_forward_factors(is_causal: bool) -> None:
    """Finite differences under a fixed seed."""
    options = {"feature_map": "hedgehog", "window": 3}
    mask = Mask.aligned(9, 9, is_causal=is_causal)
    tensors = [x.requires_grad_() for x in (*inputs(2, 1, 9, 9, dim=3), *maps(2, 1, 3))]

    def fixed(*leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        return run(options, mask, *leaves, dropout=0.3)

    assert torch.autograd.gradcheck(fixed, tensors)
