"""The feature maps of degree two: their products by definition, their bounds, and a model that has learned them.

How they run through linear attention is tried with the other maps, in test_linear.py and the files next to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64, gradients
from support.linear import SCALING, expected, features, inputs, learned_for, maps, names, padding, parameters, run
from support.models import batch, build
from support.swapping import swapped
from torch import Tensor

from hf_attnkit import load_pretrained
from hf_attnkit.attention.kernels import linear_sums
from hf_attnkit.attention.kernels.feature_maps.taylor import TaylorMap
from hf_attnkit.attention.kind import PARAMETERS, Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

both = pytest.mark.parametrize("name", ["taylor", "taylor_exponential"])


@both
@pytest.mark.parametrize("dim", [1, 2, 3, 6, 7])
def test_products_with_and_without_features_are_the_definition(name: str, dim: int) -> None:
    """Of an odd head size, too, where no pair of entries comes twice."""
    options = {"feature_map": name}
    query, key, _ = inputs(4, 2, 9, 11, dim)
    learned = learned_for(options, 4, 2, dim)
    module = parameters(options, query, key, *learned)
    of = dict(zip(names(options), learned, strict=True))
    phis = [features(name, of, side)(x) for side, x in (("query", query), ("key", key))]
    wanted = phis[0] @ phis[1].repeat_interleave(2, dim=1).mT
    found = [module.query(query), module.key(key)]
    assert {x.shape[-1] for x in found} == {module.num_features}
    assert_exact64(found[0] @ found[1].repeat_interleave(2, dim=1).mT, wanted, terms=dim**2)
    assert_exact64(module.products(query, key), wanted, terms=dim**2)


def test_they_start_as_the_series_at_the_usual_scaling() -> None:
    """With exponentials that sum to 1 where the query and the key are 0, but for their bound. In float32."""
    query, key, _ = inputs(2, 1, 5, 7, dim=8)
    s = query @ key.mT * 8**-0.5
    module = LinearAttention("taylor").create_parameters(2, 1, 8).double()
    assert (module.products(query, key) - (1 + s + s.square() / 2)).abs().max() <= 1e-6 * s.square().max()
    module = LinearAttention("taylor_exponential").create_parameters(2, 1, 8).double()
    assert (module.products(torch.zeros_like(query), torch.zeros_like(key)) - 2).abs().max() <= 0.01


@both
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [20, 60], ids=["at once", "through the features"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_exponentials_are_bounded(name: str, dtype: torch.dtype, length: int, is_causal: bool) -> None:
    """Entries of 10,000, where an exponent without a bound is over 1,000: all finite, gradients too."""
    options = {"feature_map": name}
    learned = learned_for(options, 4, 2)
    tensors = [x.to(dtype) for x in (*(1e4 * x for x in inputs(4, 2, length, length)), *learned)]
    module = parameters(options, *tensors[:2], *tensors[3:])
    series = module.key if name == "taylor" else module.key.taylor
    weights = series.weights(tensors[1].float())
    assert weights.max() > 1e5 and weights.min() < 1e-5  # at the bounds, e^12 and e^-12
    assert weights.log().abs().max() <= 12.001
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=padding("left", length))
    for result in gradients(lambda *t: run(options, mask, *t), *tensors):
        assert result.dtype == dtype and result.isfinite().all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_many_features_are_mapped_fewer_tokens_at_a_time(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"feature_map": "taylor"}
    tensors = [*inputs(4, 2, 61, 61), *learned_for(options, 4, 2)]
    mapped: list[int] = []
    forward = TaylorMap.forward

    def noting(self: TaylorMap, x: Tensor) -> Tensor:
        mapped.append(x.shape[2])
        return forward(self, x)

    monkeypatch.setattr(TaylorMap, "forward", noting)
    monkeypatch.setattr(linear_sums, "CHUNK", 5)
    mask = Mask.aligned(61, 61, is_causal=is_causal)
    for numbers, most in ((31 * 27, 25), (31, 20), (10**9, 61)):  # whole chunks, at least four
        mapped.clear()
        monkeypatch.setattr(linear_sums, "NUMBERS", numbers)
        assert_exact64(run(options, mask, *tensors), expected(options, mask, *tensors), terms=122)
        assert max(mapped) == most


@both
def test_another_number_of_heads_is_refused(name: str) -> None:
    kind = LinearAttention(name)
    query, key, value = inputs(4, 2, 5, 5)
    mask = Mask.aligned(5, 5, is_causal=True)
    for made, message in (
        ((8, 2, 6), "made for 8 heads of size 6 and got 4 heads of size 6"),
        ((4, 1, 6), "made for 1 heads of size 6 and got 2 heads of size 6"),
        ((4, 2, 8), "made for 4 heads of size 8 and got 4 heads of size 6"),
    ):
        call = Call(parameters=kind.create_parameters(*made).double())
        with pytest.raises(ValueError, match=message):
            kind.attention(query, key, value, mask, scaling=SCALING, call=call)
        with pytest.raises(ValueError, match=message):
            kind.of_any_length(query, key, value, mask, scaling=SCALING, call=call)


@pytest.mark.parametrize("options", [{}, {"window": 3, "gate": "learned", "decay": "learned"}], ids=["alone", "hybrid"])
@both
def test_a_model_that_learned_them_is_saved_loaded_and_generates(
    name: str, options: dict[str, Any], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By steps from its state, past the length up to which rows are summed at once, as without a cache."""
    model = swapped(build("llama", "causal"), "linear", feature_map=name, **options).double()
    generator = torch.Generator().manual_seed(0)
    learned: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if PARAMETERS in n}
    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.hf_attnkit == model.config.hf_attnkit
    given = batch(model)
    with torch.no_grad():
        assert (loaded(**given).logits - model(**given).logits).abs().max() <= 1e-9
        few = getattr(model.model.layers[0].self_attn, PARAMETERS)
        monkeypatch.setattr(few, "num_features", 8)  # of this layer: the others stay at once
        whole = model(**given, use_cache=False).logits
    assert (loaded(**given).logits - whole).abs().max() <= 1e-9 * whole.abs().max()
    more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(**given, **more), loaded.generate(**given, **more, use_cache=False))


def test_maps_are_of_each_head_alone() -> None:
    """The gradient of one query head's output is 0 for every other query head's map, and for the other key head's."""
    options = {"feature_map": "taylor_exponential"}
    mask, tensors = Mask.aligned(12, 12, is_causal=False), [*inputs(4, 2, 12, 12), *learned_for(options, 4, 2)]
    assert len(tensors[3:]) == len(names(options)) and len(maps(4, 2)) < len(names(options))
    _, *grads = gradients(lambda *t: run(options, mask, *t)[:, :1], *tensors)
    for name, grad in zip(names(options), grads[3:], strict=True):
        assert grad[0].any() and not grad[1:].any(), name
