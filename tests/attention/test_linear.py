"""Linear attention with Hedgehog features and a softmax window against its definition in float64.

Plain features without a window also run through the tests that all kinds share. See also test_linear_state.py and
test_linear_precision.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import gradients
from support.linear import OPTIONS, both_ways, compare, every_option, inputs, learned_for, maps, padding, run
from torch import Tensor, nn

from hf_attnkit.attention.kernels import linear_sums
from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

HEDGEHOG = LinearAttention("hedgehog")
pytestmark = pytest.mark.usefixtures("small_segments")


@both_ways
@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("length", [1, 2, 7, 25, 61])
@every_option
def test_lengths(options: dict[str, Any], length: int, kind: str, is_causal: bool) -> None:
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=padding(kind, length))
    compare(options, mask, [*inputs(6, 3, length, length), *learned_for(options, 6, 3)])


@both_ways
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@every_option
def test_groupings(options: dict[str, Any], heads: tuple[int, int], is_causal: bool) -> None:
    mask = Mask.aligned(30, 30, is_causal=is_causal, key_visible=padding("left", 30))
    compare(options, mask, [*inputs(*heads, 30, 30), *learned_for(options, *heads)])


@both_ways
@pytest.mark.parametrize("placing", [(0, 7, 40), (9, 1, 40), (39, 1, 40), (9, 31, 70), (60, 40, 100)], ids=str)
@every_option
def test_queries_anywhere(options: dict[str, Any], placing: tuple[int, int, int], is_causal: bool) -> None:
    """Keys before the queries (a cache) and behind them (empty slots of a StaticCache)."""
    offset, queries, keys = placing
    positions = torch.arange(offset, offset + queries)[None], torch.arange(keys)[None]
    mask = Mask(*positions, is_causal=is_causal, key_visible=padding("left", keys))
    compare(options, mask, [*inputs(4, 2, queries, keys), *learned_for(options, 4, 2)])


@both_ways
@every_option
def test_queries_that_see_nothing(options: dict[str, Any], is_causal: bool) -> None:
    """They give exactly 0, and gradients stay finite and away from them."""
    seen = torch.ones(2, 40, dtype=torch.bool)
    seen[1] = False
    seen[0, :10] = False
    mask = Mask.aligned(40, 40, is_causal=is_causal, key_visible=seen)
    tensors = inputs(4, 2, 40, 40)
    output, *grads = gradients(partial(run, options, mask), *tensors, *learned_for(options, 4, 2))
    assert not output[1].any() and output[0, :, 10:].all()
    assert not is_causal or not output[0, :, :10].any()
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert all(grad[0].any() and not grad[1].any() for grad in grads[:3])


# Memory.


@every_option
def test_nothing_quadratic_is_kept_for_the_backward_pass(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the tokens, at most four times the numbers saved, and what does not grow."""
    monkeypatch.setattr(linear_sums, "SEGMENT", 64)
    monkeypatch.setattr(linear_sums, "CHUNK", 16)
    saved = []
    for length in (256, 1024):
        tensors = [x.requires_grad_() for x in (*inputs(2, 1, length, length), *learned_for(options, 2, 1))]
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run(options, Mask.aligned(length, length, is_causal=True), *tensors)
        saved.append(sum(storages.values()))
        del output
    assert saved[1] <= 4.2 * saved[0]


# Parameters, options and refusals.


def test_parameters_start_as_the_identity() -> None:
    assert LinearAttention().create_parameters(4, 2, 8) is None
    module = LinearAttention("hedgehog", window=3).create_parameters(4, 2, 8)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {"query.weight": (4, 8, 8), "query.bias": (4, 8), "key.weight": (2, 8, 8), "key.bias": (2, 8)}
    assert isinstance(module, nn.Module) and all(parameter.requires_grad for parameter in module.parameters())
    x = torch.randn(3, 4, 5, 8)
    assert torch.allclose(module.query(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1), atol=1e-6)


def test_parameters_load_and_run_in_half_precision() -> None:
    module = HEDGEHOG.create_parameters(4, 2, 6)
    with torch.no_grad():
        for parameter, tensor in zip(module.parameters(), maps(4, 2), strict=True):
            parameter.copy_(tensor)
    again = HEDGEHOG.create_parameters(4, 2, 6)
    again.load_state_dict(module.state_dict())
    tensors = [x.bfloat16() for x in inputs(4, 2, 20, 20)]
    mask = Mask.aligned(20, 20, is_causal=True)
    results = [HEDGEHOG.attention(*tensors, mask, scaling=1.0, call=Call(parameters=m))[0] for m in (module, again)]
    assert torch.equal(*results) and results[0].dtype == torch.bfloat16
    half = HEDGEHOG.attention(*tensors, mask, scaling=1.0, call=Call(parameters=again.bfloat16()))[0]
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "relu"}, r"feature_map='relu' must be one of 'elu', 'hedgehog'"),
        ({"feature_map": None}, r"feature_map=None must be one of"),
        ({"window": 0}, r"window=0 must be an integer of at least 1"),
        ({"window": True}, r"window=True must be an integer"),
        ({"window": 2.0}, r"window=2\.0 must be an integer"),
        ({"window": 4, "gate": "head"}, r"gate='head' must be one of 'learned': .* or None for none"),
        ({"window": 4, "branches": "far"}, r"branches='far' must be one of 'both', 'window', 'linear'"),
        ({"gate": "learned"}, r"gate='learned' needs a window and window=None.*for example window=64, or gate=None"),
        ({"branches": "linear"}, r"branches='linear' needs a window and window=None.*or branches='both'"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttention(**options)


def test_options_accepted() -> None:
    LinearAttention()
    for options in OPTIONS:
        LinearAttention(**options)


def test_bias_refused() -> None:
    mask = Mask.receive(torch.zeros(1, 1, 5, 5), 5, 5, is_causal=False, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cannot add an attention bias .* use 'mha' or 'gqa'"):
        run({"feature_map": "elu"}, mask, *inputs(2, 2, 5, 5))


def test_missing_and_foreign_parameters_refused() -> None:
    mask, tensors = Mask.aligned(5, 5, is_causal=True), inputs(4, 2, 5, 5)
    with pytest.raises(
        ValueError,
        match=r"parameters=None; pass the module of .*create_parameters",
    ):
        HEDGEHOG.attention(*tensors, mask, scaling=1.0)
    other = HEDGEHOG.create_parameters(8, 2, 6)
    with pytest.raises(ValueError, match="made for 8 heads of size 6 and got 4 heads of size 6"):
        HEDGEHOG.attention(*tensors, mask, scaling=1.0, call=Call(parameters=other))
