"""Keyword arguments of a model's call that would do nothing raise, whether or not the model hands them down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import build
from support.swapping import swapped
from torch import Tensor, nn

from hf_attnkit import restore_attention, swap_attention
from hf_attnkit.attention.call_checks import check_call

FAMILIES = ["llama", "bert", "distilbert", "gpt2", "stablelm"]


def ids() -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_of_all_layers_or_an_error(family: str) -> None:
    model = build(family)
    mixed = swap_attention(copy.deepcopy(model), {0: "flash", 1: "mha"})
    with pytest.raises(ValueError, match="attention 'flash' forms no attention weights"):
        mixed(ids(), output_attentions=True)
    found = swapped(model, "mha")(ids(), output_attentions=True).attentions
    assert [weights.shape for weights in found] == [(2, 8, 9, 9)] * 2
    kept = swap_attention(copy.deepcopy(model), {0: "mha"})  # the other layer keeps SDPA, which forms none
    with pytest.raises(ValueError, match="attention 'sdpa' forms no attention weights"):
        kept(ids(), output_attentions=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_global_tokens_reach_the_layers_or_an_error(family: str) -> None:
    model = swapped(build(family), "local_global", window=2)
    marks = torch.zeros(2, 9, dtype=torch.long)
    marks[:, 4] = 1
    options: dict[str, Any] = {"global_attention_mask": marks}
    options |= {} if family in ("bert", "distilbert") else {"use_cache": False}
    before = model(ids())[0]
    if family == "stablelm":
        with pytest.raises(ValueError, match="StableLmModel does not hand it down to StableLmAttention"):
            model(ids(), **options)
    else:
        assert (model(ids(), **options)[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(model(ids())[0], before)
    unread = swapped(build(family), "flash")
    with pytest.raises(ValueError, match="no layer reads it: they run 'flash'"):
        unread(ids(), **options)


def test_through_a_head_whose_inputs_have_another_shape() -> None:
    model = swapped(build("bert", "choice"), "local_global", window=2)
    marks = torch.zeros(2, 9, dtype=torch.long)
    marks[:, 4] = 1
    given = ids()[None]
    assert not torch.equal(model(given).logits, model(given, global_attention_mask=marks).logits)


def test_checks_are_removed_with_the_swap() -> None:
    model = swapped(build("llama", "causal"), "flash")
    assert all(check_call in part._forward_pre_hooks.values() for part in (model, model.model))
    restore_attention(model)
    assert not any(isinstance(part, nn.Module) and part._forward_pre_hooks for part in model.modules())


def test_tracing_is_refused() -> None:
    model = swapped(build("bert", return_dict=False), "flash")
    with pytest.raises(ValueError, match=r"torch\.jit\.trace .* torch\.export"):
        torch.jit.trace(model, ids())
