"""The decay of linear attention's state: parallel, chunked and step by step against one definition in float64."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate, assert_exact64, gradients
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
from support.models import batch, build
from support.reference import phi
from torch import Tensor

from hf_attnkit import swap_attention
from hf_attnkit.attention.kernels import linear_decay
from hf_attnkit.attention.kind import PARAMETERS, Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

pytestmark = pytest.mark.usefixtures("small_segments")
PLAIN = {"feature_map": "elu", "decay": "learned"}
WINDOW = {"feature_map": "hedgehog", "window": 4, "decay": "learned", "gate": "learned"}


@both_ways
@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_with_learned_maps_a_window_and_a_gate(kind: str, is_causal: bool) -> None:
    mask = Mask.aligned(61, 61, is_causal=is_causal, key_visible=padding(kind, 61))
    compare(WINDOW, mask, [*inputs(6, 3, 61, 61), *learned_for(WINDOW, 6, 3)])


@pytest.mark.parametrize("sizes", [[1] * 40, [13, 1, 26]], ids=["tokens", "chunks"])
def test_any_split_with_a_window_is_one_pass(sizes: list[int]) -> None:
    seen = padding("left", 40)
    mask = Mask.aligned(40, 40, is_causal=True, key_visible=seen)
    tensors = [*inputs(4, 2, 40, 40), *learned_for(WINDOW, 4, 2)]
    got = gradients(lambda *t: generate(WINDOW, sizes, seen, list(t))[0], *tensors)
    want = gradients(partial(expected, WINDOW, mask), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=80)


@both_ways
@pytest.mark.parametrize("options", [PLAIN, WINDOW], ids=["plain", "window"])
@pytest.mark.parametrize("placing", [(0, 61, 61), (9, 31, 70)], ids=str)
def test_one_expression(placing: tuple[int, int, int], options: dict[str, Any], is_causal: bool) -> None:
    offset, queries, keys = placing
    positions = torch.arange(offset, offset + queries)[None], torch.arange(keys)[None]
    mask = Mask(*positions, is_causal=is_causal, key_visible=padding("left", keys))

    def one(query: Tensor, key: Tensor, value: Tensor, *learned: Tensor) -> Tensor:
        call = Call(parameters=parameters(options, query, key, *learned))
        return LinearAttention(**options).of_any_length(query, key, value, mask, scaling=SCALING, call=call)

    tensors = [*inputs(4, 2, queries, keys), *learned_for(options, 4, 2)]
    got, want = gradients(one, *tensors), gradients(partial(expected, options, mask), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=2 * keys)


def test_with_nothing_learned_it_is_retention() -> None:
    """RetNet's parallel form: products times gamma^(i - j), here under a normaliser."""
    query, key, value = inputs(3, 3, 50, 50)
    learned = list(LinearAttention(**PLAIN).create_parameters(3, 3, 6).double().parameters())
    gamma = torch.tensor([1 - 2.0**-4, 1 - 2.0**-8, 1 - 2.0**-12], dtype=torch.float64)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    terms = (phi(query) @ phi(key).mT * gamma[:, None, None] ** distance.abs()).tril()
    output = run(PLAIN, Mask.aligned(50, 50, is_causal=True), query, key, value, *learned)
    # The start of b is kept in float32: of a it changes the last digits, at most 50 times over.
    wanted = terms / terms.sum(-1, keepdim=True) @ value
    assert (output - wanted).abs().max() <= 50 * torch.finfo(torch.float32).eps * value.abs().max()


def test_memories_start_from_16_to_4096_tokens() -> None:
    memory = 1 / (1 - linear_decay.starting_bias(5).double().sigmoid())
    assert memory.tolist() == pytest.approx([16, 64, 256, 1024, 4096], rel=1e-5)
    assert 1 / (1 - linear_decay.starting_bias(1).double().sigmoid()).item() == pytest.approx(256, rel=1e-5)
    assert not linear_decay.Decay(3, 6).weight.any()


# Numbers that are no use: factors of 0 and 1.


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logit", [-300.0, 300.0], ids=["nothing stays", "all stays"])
def test_factors_of_0_and_1(logit: float, dtype: torch.dtype, is_causal: bool) -> None:
    """e^-300 is below float32, 1 - e^-300 is 1: the value of the own key, or no decay at all."""
    query, key, value = (x.to(dtype) for x in inputs(4, 2, 61, 61))
    weight, bias = torch.zeros(2, 6, dtype=dtype), torch.full((2,), logit, dtype=dtype)
    mask = Mask.aligned(61, 61, is_causal=is_causal)
    output, *grads = gradients(partial(run, PLAIN, mask), query, key, value, weight, bias)
    wanted = value.repeat_interleave(2, 1) if logit < 0 else run({"feature_map": "elu"}, mask, query, key, value)
    assert (output - wanted).abs().max() <= 2**8 * torch.finfo(dtype).eps * value.abs().max()
    assert all(grad.isfinite().all() for grad in grads)
    both = gradients(partial(run, WINDOW, mask), query, key, value, *learned_extreme(logit, dtype))
    assert all(result.isfinite().all() for result in both)


def learned_extreme(logit: float, dtype: torch.dtype) -> list[Tensor]:
    values = [x.to(dtype) for x in learned_for(WINDOW, 4, 2)]
    return [torch.full_like(x, logit) if x.shape == (2,) else x for x in values]


@both_ways
def test_a_token_that_leaves_nothing_costs_the_others_no_digits(is_causal: bool) -> None:
    """ln a = -1,000 once: differences of a running sum would give the later factors to 6e-5 only."""
    query, key, value = inputs(2, 1, 90, 90)
    key[..., 0] = 0.0
    key[:, :, 45, 0] = -1.0
    learned = [torch.eye(1, 6, dtype=torch.float64) * 1000.0, torch.full((1,), 3.0, dtype=torch.float64)]
    mask = Mask.aligned(90, 90, is_causal=is_causal)
    tensors = [x.float() for x in (query, key, value, *learned)]
    ours = gradients(partial(run, PLAIN, mask), *tensors)
    theirs = gradients(partial(expected, PLAIN, mask), *tensors)
    exact = gradients(partial(expected, PLAIN, mask), *(x.double() for x in tensors))
    for actual, plain, truth in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(actual, plain, truth, terms=12)
    whole = {"query": tensors[0], "key": tensors[1], "value": tensors[2], "mask": mask, "scaling": SCALING}
    call = Call(parameters=parameters(PLAIN, *tensors[:2], *tensors[3:]))
    one = LinearAttention(**PLAIN).of_any_length(**whole, call=call)
    assert_as_accurate(one, theirs[0], exact[0], terms=12)


# Whole models, and refusals.


@torch.no_grad()
def test_beams_and_greedy_are_those_without_a_cache() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="linear attention is another function")
        model = swap_attention(build("llama", "causal"), "linear", **WINDOW)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if PARAMETERS in name:
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    for options in ({"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        settings = {"max_new_tokens": 8, "do_sample": False}
        given = batch(model, (14, 9))
        found = model.generate(**given, **settings, **options)
        beams = {"num_beams": options.get("num_beams", 1)}
        assert torch.equal(found, model.generate(**given, **settings, **beams, use_cache=False))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"decay='exp' must be one of 'learned': one factor per key/value head"):
        LinearAttention(decay="exp")
    kind, mask, tensors = LinearAttention(**PLAIN), Mask.aligned(5, 5, is_causal=True), inputs(4, 2, 5, 5)
    with pytest.raises(ValueError, match=r"decay='learned' needs its parameters and the layer has none; pass"):
        kind.attention(*tensors, mask, scaling=1.0)
    other = kind.create_parameters(8, 4, 6)
    with pytest.raises(ValueError, match="decay was made for 4 key/value heads of size 6 and got 2 heads of size 6"):
        kind.attention(*tensors, mask, scaling=1.0, call=Call(parameters=other))
