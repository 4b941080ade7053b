"""A cut writes the fields that hold numbers of heads, into the model as it is then, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import batch, build, outputs

from hf_attnkit.editing import projections
from hf_attnkit.editing.cut_heads import CutHeads, cut_heads
from hf_attnkit.editing.projections import Edit
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import attention_layers

FAMILIES = ["bert", "llama", "distilbert"]


def half_of_the_heads(model: Any) -> CutHeads:
    return cut_heads(model, {0: range(4, 8), 1: range(4, 8)}, discover(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_numbers_of_heads_are_written(family: str) -> None:
    model = build(family)
    model.config.note = "set before"
    module = attention_layers(model)[0].module
    module.note = "this too"
    states = [dict(model.config.__dict__), dict(module.__dict__)]
    half_of_the_heads(model)
    assert (model.config.note, module.note) == ("set before", "this too")
    numbers = {"num_attention_heads", "n_heads", "num_heads", "all_head_size", "hf_attnkit_heads_left"}
    for owner, before in zip((model.config, module), states, strict=True):
        written = {
            name
            for name in before.keys() | owner.__dict__.keys()
            if before.get(name, states) is not owner.__dict__.get(name, states)
        }
        assert written <= numbers and (written or owner is model.config), written


@pytest.mark.parametrize("family", FAMILIES)
def test_undone_for_a_while_it_is_the_model_before_and_then_again_the_changed_one(family: str) -> None:
    model = build(family)
    inputs = batch(model)
    before = outputs(model, inputs)
    cut = half_of_the_heads(model)
    layer = attention_layers(model)[1]
    assert cut.covers(layer.output) and not cut.covers(torch.nn.Linear(2, 2))
    projections.apply(Edit(layer.output, 2 * layer.output.weight.detach(), layer.output.bias))  # a refit
    after = outputs(model, inputs)
    for _ in range(2):
        with cut.undone():
            assert torch.equal(outputs(model, inputs), before) and attention_layers(model)[0].num_heads == 8
        assert torch.equal(outputs(model, inputs), after) and attention_layers(model)[0].num_heads == 4
    with pytest.raises(ZeroDivisionError), cut.undone():
        _ = 1 / 0
    assert torch.equal(outputs(model, inputs), after) and not torch.equal(after, before)
    cut.undo()
    assert torch.equal(outputs(model, inputs), before) and attention_layers(model)[0].num_heads == 8
