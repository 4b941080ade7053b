"""`attention_backends` tells what ran, layer by layer."""

from __future__ import annotations

import pytest
import torch
from support.models import batch, build
from support.unchanged import unchanged

from hf_attnkit import attention_backends, swap_attention


def test_it_names_what_each_layer_ran() -> None:
    model = swap_attention(build("bert"), {0: ("flash", {"backend": "tiled"}), 1: "gqa"})
    found = attention_backends(model, **batch(model))
    assert {layer: backend for layer, (backend, _) in found.items()} == {0: "tiled", 1: "gqa"}
    assert all(reason for _, reason in found.values())


def test_a_layer_that_is_not_swapped_says_so() -> None:
    model = swap_attention(build("bert"), "gqa", layers=[1])
    found = attention_backends(model, **batch(model))
    assert found[0][1] == "not swapped" and found[1][0] == "gqa"


def test_the_choice_follows_the_inputs() -> None:
    """Padding alone decides whether SDPA runs without a mask; dropout in training decides, too."""
    model = swap_attention(build("llama", "causal", 8, 4), "flash").eval()
    ids = torch.ones(2, 9, dtype=torch.long)
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    whole, masked = (
        attention_backends(model, input_ids=ids, attention_mask=mask)[0] for mask in (torch.ones_like(ids), padded)
    )
    assert whole != masked


def test_it_changes_nothing_and_refuses_a_model_without_a_swap() -> None:
    model = swap_attention(build("bert"), "flash").train()
    inputs, state = batch(model), torch.random.get_rng_state()
    with unchanged(model):
        attention_backends(model, **inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"every layer; .*swap_attention\(model, 'flash'\)"):
        attention_backends(build("bert"), **inputs)
