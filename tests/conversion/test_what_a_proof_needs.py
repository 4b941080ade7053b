"""Changes whose proof would say nothing, or whose parameters others share."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.any_model import any_model
from support.calibrated import batches_for
from support.models import build
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, prune_heads
from hf_attnkit.conversion.owned_change import LayerMerge


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_conversion_is_proven(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other key heads than the groups' first, as a wrong row would keep, are noticed."""
    model, right = build(family), LayerMerge.plan

    def wrong(self: LayerMerge, attention: Any, owned: Any) -> Any:
        plan = right(self, attention, owned)
        return replace(plan, key_value_heads=tuple(range(len(plan.key_value_heads))))

    monkeypatch.setattr(LayerMerge, "plan", wrong)
    with unchanged(model), pytest.raises(ValueError, match="differ"):
        convert_to_gqa(model, 2)


@pytest.mark.parametrize("change", [lambda m: prune_heads(m, {0: [0, 1]}), lambda m: convert_to_gqa(m, 1)])
def test_outputs_of_nan_prove_nothing(change: Any) -> None:
    model = copy.deepcopy(any_model("mixtral"))
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nothing but NaN or infinity"):
        change(model)


def test_a_refit_does_not_untie_output_projections() -> None:
    model = copy.deepcopy(any_model("mixtral"))
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    batches = batches_for(model)
    with pytest.raises(ValueError, match="shared"):
        prune_heads(model, {0: [0, 1]}, calibration=batches)
    assert layers[1].self_attn.o_proj.weight is layers[0].self_attn.o_proj.weight


def test_a_pruned_gpt2_gets_another_basis() -> None:
    """Its output projection is no longer square."""
    model = copy.deepcopy(any_model("gpt2"))
    prune_heads(model, {0: [1, 2]})
    convert_to_gqa(model, 1, calibration=batches_for(model))
    assert [layer.attn.c_proj.weight.shape[0] for layer in model.transformer.h] == [16, 32]


def test_a_budget_spent_over_layers_of_which_one_has_no_more_to_give() -> None:
    model = copy.deepcopy(any_model("mixtral"))
    convert_to_gqa(model, [1, 2])
    convert_to_gqa(model, budget=0.7, uniform=False)
    with pytest.raises(ValueError, match="must be True or False"):
        convert_to_gqa(model, budget=0.5, uniform="no")
