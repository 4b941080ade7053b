"""What a change costs: a model is run once to find its heads, whatever the steps of the change ask of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, plan_gqa, prune_heads
from hf_attnkit.models import known

PROBE = {"input_ids": torch.tensor([[3, 4, 5]]), "lang_ids": torch.tensor([0])}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The probe of each discovery."""
    found: list[Any] = []
    discover = known.discover

    def noted(model: PreTrainedModel, probe: Any = None) -> Any:
        found.append(probe)
        return discover(model, probe)

    monkeypatch.setattr(known, "discover", noted)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda model: convert_to_gqa(model, 1),
        lambda model: convert_to_gqa(model, 1, calibration=[{"input_ids": torch.arange(3, 67)[None]}], refit="none"),
        lambda model: prune_heads(model, {0: [0, 1]}),
        lambda model: prune_heads(model, {0: [0, 1], 1: [0, 1]}),
    ],
    ids=["converted", "calibrated", "pruned", "pruned alike"],
)
def test_a_change_looks_once(change: Callable[[PreTrainedModel], Any], runs: list[Any]) -> None:
    change(small_model("llama"))
    assert len(runs) == 1


def test_a_plan_that_is_applied_later_looks_again(runs: list[Any]) -> None:
    """At what it was made for: the inputs of modules are not kept with it."""
    model = small_model("llama")
    plan = plan_gqa(model, 1)
    assert len(runs) == 1
    plan.apply()
    assert len(runs) == 2


def test_a_probe_holds_for_one_pruning(runs: list[Any]) -> None:
    """XMOD cannot run on inputs that are made from its forward: which language it is has to be said."""
    model = small_model("xmod")
    whole = copy.deepcopy(model)
    with unchanged(model), pytest.raises(ValueError, match="no inputs could be made"):
        prune_heads(model, {0: [0]})
    prune_heads(model, {0: [0]}, probe=PROBE)
    assert [probe is None for probe in runs] == [True, False]
    with pytest.raises(ValueError, match="no inputs could be made"):
        prune_heads(model, {0: [0]})
    with unchanged(whole), pytest.raises(ValueError, match="does not run on the probe"):
        prune_heads(whole, {0: [0]}, probe={"input_ids": "text"})
    assert model.num_parameters() < whole.num_parameters()
