"""The attention layers of models that no table knows: found by running them, and never out of date."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from support.any_model import any_model
from support.every_type import small_model
from support.models import build
from support.unchanged import unchanged
from torch import nn

from hf_attnkit import cache_bytes_per_token, head_importance, prune_heads, select_heads, set_probe
from hf_attnkit.models import known
from hf_attnkit.models.layers import attention_layers, discovered_layers
from hf_attnkit.models.numbered_before import attentions_by_number, head_numbers


@pytest.mark.parametrize("family", ["bert", "llama", "qwen3", "vit"])
def test_discovery_says_what_the_table_says(family: str) -> None:
    model = build(family)
    table = {id(layer.module): layer for layer in attention_layers(model)}
    found = discovered_layers(model)
    # In the same order, so that numbers of layers from scores and swaps are those that pruning takes.
    assert [id(layer.module) for layer in found] == list(table)
    for layer in found:
        same = table[id(layer.module)]
        for name in ("num_heads", "num_key_value_heads", "head_dim", "value_head_dim", "is_cross"):
            assert getattr(layer, name) == getattr(same, name), name
        assert layer.output is same.output
        assert layer.block is same.block


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "t5", "bart", "bert", "distilbert", "llama", "phi3", "vit"])
def test_layers_have_the_numbers_that_a_table_once_gave(family: str) -> None:
    model = build(family)
    numbered = attentions_by_number(model)
    assert numbered is not None and [layer.module for layer in attention_layers(model)] == numbered
    for module, layer in zip(numbered, attention_layers(model), strict=True):
        assert head_numbers(module) == (layer.num_heads, layer.num_key_value_heads, layer.head_dim)
    assert attentions_by_number(small_model("mixtral")) is None


def test_a_model_of_its_own_code_may_have_the_type_of_another() -> None:
    model = any_model("never seen")
    type(model.config).model_type, before = "llama", type(model.config).model_type
    try:
        assert len(attention_layers(model)) == 2
        prune_heads(model, {0: [0, 1]})
        assert [len(layer.heads) for layer in attention_layers(model)] == [2, 4]
    finally:
        type(model.config).model_type = before


def test_fields() -> None:
    model = small_model("mixtral")
    with unchanged(model):
        layers = attention_layers(model)
    assert [layer.name for layer in layers] == [f"layer {i} (model.layers.{i}.self_attn)" for i in range(2)]
    for index, layer in enumerate(layers):
        block = model.model.layers[index]
        assert layer.block is block and layer.module is block.self_attn and layer.output is block.self_attn.o_proj
        assert layer.index == index and layer.query is None and not layer.refusal


def test_a_module_called_several_times_is_one_layer() -> None:
    model = small_model("albert")
    assert model.config.num_hidden_layers == 2 and len(attention_layers(model)) == 1
    assert head_importance(model, method="magnitude").shape == (1, model.config.num_attention_heads)


def test_it_is_kept_and_never_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = small_model("opt"), []
    real = known.discover

    def counted(*args: object) -> object:
        runs.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(known, "discover", counted)
    first = attention_layers(model)
    assert attention_layers(model) == first and len(runs) == 1
    # Another copy is another model.
    other = copy.deepcopy(model)
    assert attention_layers(other)[0].module is not first[0].module and len(runs) == 2
    # A parameter that is replaced, with the same shape.
    attention = first[0].module
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.detach().clone())
    assert len(attention_layers(model)) == len(first) and len(runs) == 3
    # Fewer layers.
    model.model.decoder.layers = model.model.decoder.layers[:1]
    assert len(attention_layers(model)) == 1 and len(runs) == 4


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    model = small_model("opt")
    attention_layers(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_groups_and_caches() -> None:
    model = small_model("mixtral")
    layers = attention_layers(model)
    sizes = [layer.num_key_value_heads * (layer.head_dim + layer.value_head_dim) * 4 for layer in layers]
    assert cache_bytes_per_token(model) == sum(sizes)
    scores = torch.rand(2, layers[0].num_heads)
    removed = select_heads(scores, model=model, num_heads=layers[0].group_size)
    assert sum(map(len, removed.values())) == layers[0].group_size


def test_inputs_that_the_user_gives() -> None:
    model = small_model("llava")
    set_probe(model, {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])})
    assert all("language_model" in layer.name for layer in attention_layers(model))
    with pytest.raises(ValueError, match="does not run on the probe"):
        set_probe(model, {"input_ids": "text"})
    assert all("language_model" in layer.name for layer in attention_layers(model))
    set_probe(model, None)
    assert any("vision_tower" in layer.name for layer in attention_layers(model))
    with pytest.raises(TypeError, match="pass the model itself"):
        set_probe(nn.Linear(2, 2), {})  # type: ignore[arg-type]
