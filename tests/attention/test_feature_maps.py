"""What holds for every feature map of linear attention, also for one that is added to the table."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_exact64
from support.linear import inputs
from torch import Tensor

from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS, Map
from hf_attnkit.attention.kernels.linear_sums import LinearState
from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

every = pytest.mark.parametrize("name", FEATURE_MAPS)


def made(name: str) -> tuple[Map, Map, torch.nn.Module | None]:
    """The maps of queries and keys, for 4 over 2 heads of size 6, with something learned."""
    module = FEATURE_MAPS[name].make(4, 2, 6)
    assert (module is None) == (FEATURE_MAPS[name].fixed is not None)
    if module is None:
        return FEATURE_MAPS[name].fixed, FEATURE_MAPS[name].fixed, None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.query, module.key, module


@every
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_products_are_positive_and_wide(name: str, scale: float) -> None:
    phi_query, phi_key, _ = made(name)
    query, key, _ = (scale * x for x in inputs(4, 2, 30, 40))
    products: list[Tensor] = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        features = [
            phi(x.to(dtype)).repeat_interleave(n, 1) for phi, x, n in ((phi_query, query, 1), (phi_key, key, 2))
        ]
        assert {x.dtype for x in features} == {torch.float64 if dtype == torch.float64 else torch.float32}
        products.append(features[0] @ features[1].mT)
    assert all((x > 0).all() and x.isfinite().all() for x in products)


@every
def test_state_and_one_expression_give_the_same(name: str) -> None:
    _, _, module = made(name)
    kind = LinearAttention(name, window=3, decay="learned")
    parameters = kind.create_parameters(4, 2, 6)
    if module is not None:
        parameters.load_state_dict(module.state_dict(), strict=False)
    call, (query, key, value) = Call(parameters=parameters), inputs(4, 2, 30, 30)
    mask = Mask.aligned(30, 30, is_causal=True)
    whole = kind.attention(query, key, value, mask, scaling=0.4, call=call)[0]
    assert_exact64(kind.of_any_length(query, key, value, mask, scaling=0.4, call=call), whole, terms=60)
    state, steps = LinearState(), []
    for token in range(30):
        given = slice(max(0, token - 2), token + 1)
        one = Mask.aligned(1, given.stop - given.start, is_causal=False)
        parts = query[:, :, token : token + 1], key[:, :, given], value[:, :, given]
        steps.append(kind.attention(*parts, one, scaling=0.4, call=Call(state, parameters))[0])
    assert_exact64(torch.cat(steps, dim=2), whole, terms=60)


@every
def test_the_same_where_no_gradient_is_taken(name: str) -> None:
    """There memory is written over: the features', never that of what was given."""
    phi_query, phi_key, _ = made(name)
    query, key, _ = inputs(4, 2, 30, 40)
    for phi, given in ((phi_query, query), (phi_key, key)):
        for x in (given, given.to(torch.bfloat16), given.transpose(2, 3).contiguous().transpose(2, 3)):
            before, with_gradient = x.clone(), phi(x.clone().requires_grad_())
            with torch.no_grad():
                assert torch.equal(phi(x), with_gradient) and torch.equal(x, before)
            with torch.inference_mode():
                assert torch.equal(phi(x), with_gradient)


@every
def test_slopes_hold_at_zero(name: str) -> None:
    """Keys of zeros are what a padded or freshly made projection gives; a one-sided slope there would not train."""
    phi_query, phi_key, _ = made(name)
    for phi, heads in ((phi_query, 4), (phi_key, 2)):
        zeros = torch.zeros(1, heads, 2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(phi, zeros)
