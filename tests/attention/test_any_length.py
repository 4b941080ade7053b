"""Every kind as one expression of any length: what its kernels compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64
from support.matrix import MATRIX
from support.models import batch, build, outputs

from hf_attnkit import swap_attention
from hf_attnkit.attention.any_length import any_length
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.kinds.local_global import LocalGlobalAttention
from hf_attnkit.attention.mask import Mask


def swapped(family: str, name: str) -> Any:
    case = MATRIX[name]
    model = build(family, "base", kv_heads=1 if family == "llama" and not case.grouped else None)
    if not case.grouped and family == "bert":
        pytest.skip("one key/value head")
    with pytest.warns(UserWarning) if case.kind.needs_transfer else torch.no_grad():
        return swap_attention(model, case.kind.name, **case.options).double()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", MATRIX)
def test_it_is_what_the_kernels_compute(name: str, family: str) -> None:
    model = swapped(family, name)
    given = batch(model, lengths=(40, 3, 25))
    kind = MATRIX[name].kind
    with torch.no_grad():
        wanted = outputs(model, given, **({"use_cache": False} if family == "llama" else {}))
        with any_length(model):
            if isinstance(kind, LocalGlobalAttention) and kind.num_random_blocks:
                with pytest.raises(ValueError, match=r"random blocks in Python.*num_random_blocks=0"):
                    model(**given)
                return
            got = outputs(model, given, **({"use_cache": False} if family == "llama" else {}))
    # Llama's norms are in float32.
    if family == "llama":
        assert (got - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max()
    else:
        assert_exact64(got, wanted, terms=40)


def test_the_kinds_come_back() -> None:
    model = swap_attention(build("bert"), "flash", layers=[0])
    before = [getattr(module, ATTRIBUTE, None) for module in model.modules()]
    with pytest.raises(RuntimeError), any_length(model):
        assert [getattr(module, ATTRIBUTE, None) for module in model.modules()] != before
        raise RuntimeError
    assert [getattr(module, ATTRIBUTE, None) for module in model.modules()] == before


def test_large_scores_of_a_window_do_not_overflow() -> None:
    """exp(1000) has no number; the window's largest score is taken out first."""
    kind, mask = LinearAttention(window=2), Mask.aligned(4, 4, is_causal=True)
    query = torch.full((1, 1, 4, 2), 100.0, dtype=torch.float64)
    value = torch.randn(1, 1, 4, 2, dtype=torch.float64)
    wanted = kind.attention(query, query, value, mask, scaling=1.0)[0]
    assert_exact64(kind.of_any_length(query, query, value, mask, scaling=1.0), wanted, terms=4)


def test_small_scores_of_a_window_do_not_underflow() -> None:
    """exp(-80) / 1e30 is below what float32 tells from no key, and the window is all that these queries see."""
    kind, mask = LinearAttention(window=4), Mask.aligned(4, 4, is_causal=True)
    query = torch.full((1, 1, 4, 2), 40.0)
    key, value = -query[:, :, :1].expand_as(query) / 40, torch.randn(1, 1, 4, 2)
    wanted = kind.attention(*(each.double() for each in (query, key, value)), mask, scaling=1.0)[0]
    got = kind.of_any_length(query, key, value, mask, scaling=1.0)
    assert (got - wanted).abs().max() <= 8 * torch.finfo(torch.float32).eps * value.abs().max()
