"""A change writes the fields that hold numbers of heads, into the model as it is then, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import batch, build, outputs
from support.unchanged import unchanged

from hf_attnkit.editing import projections
from hf_attnkit.editing.change import Change
from hf_attnkit.editing.projections import Edit, keep_columns, keep_rows
from hf_attnkit.models.layers import attention_layers

FAMILIES = ["bert", "llama", "distilbert"]


def half_of_the_heads(model: Any) -> Change:
    edits: list[Edit] = []
    for layer in attention_layers(model):
        edits += [keep_rows(getattr(layer, name), range(4), layer.head_dim) for name in ("query", "key", "value")]
        edits.append(keep_columns(layer.output, range(4), layer.head_dim))
    return Change(model, edits, [(4, 4)] * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_numbers_of_heads_are_written(family: str) -> None:
    model = build(family)
    change = half_of_the_heads(model)
    model.config.note = "set after the change was computed"
    module = attention_layers(model)[0].module
    module.note = "this too"
    states = [dict(model.config.__dict__), dict(module.__dict__)]
    with change.made():
        pass
    assert (model.config.note, module.note) == ("set after the change was computed", "this too")
    numbers = {"num_attention_heads", "num_key_value_heads", "head_dim", "n_heads", "num_heads", "num_key_value_groups",
               "all_head_size", "_heterogeneity_spec", "allow_global_per_layer_attribute_access",
               "attn_implementation"}  # fmt: skip
    for owner, before in zip((model.config, module), states, strict=True):
        written = {
            name
            for name in before.keys() | owner.__dict__.keys()
            if before.get(name, states) is not owner.__dict__.get(name, states)
        }
        assert written <= numbers and (written or owner is module), written


@pytest.mark.parametrize("family", FAMILIES)
def test_undone_for_a_while_it_is_the_model_before_and_then_again_the_changed_one(family: str) -> None:
    model = build(family)
    inputs = batch(model)
    before = outputs(model, inputs)
    with half_of_the_heads(model).made() as made:
        layer = attention_layers(model)[1]
        assert made.covers(layer.output) and not made.covers(torch.nn.Linear(2, 2))
        projections.apply(Edit(layer.output, 2 * layer.output.weight.detach(), layer.output.bias))  # a refit
        after = outputs(model, inputs)
        for _ in range(2):
            with made.undone():
                assert torch.equal(outputs(model, inputs), before) and attention_layers(model)[0].num_heads == 8
            assert torch.equal(outputs(model, inputs), after) and attention_layers(model)[0].num_heads == 4
        with pytest.raises(ZeroDivisionError), made.undone():
            _ = 1 / 0
        assert torch.equal(outputs(model, inputs), after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_the_block_puts_the_model_back_and_the_change_can_be_made_again(family: str) -> None:
    model = build(family)
    change = half_of_the_heads(model)
    with unchanged(model), pytest.raises(KeyboardInterrupt), change.made():
        output = attention_layers(model)[0].output
        projections.apply(Edit(output, 2 * output.weight.detach(), output.bias))
        raise KeyboardInterrupt
    expected = build(family)
    with half_of_the_heads(expected).made(), change.made():
        pass
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
