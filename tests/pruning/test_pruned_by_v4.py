"""Checkpoints whose heads Transformers 4 removed: `pruned_heads` in the config, weights already small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CLASSES, aligned, batch, build, outputs
from support.pruned import UNEVEN, numbers
from transformers import AutoConfig

from hf_attnkit import load_pretrained, prune_heads

FAMILIES = ["bert", "roberta", "electra", "distilbert", "vit"]


def write(folder: Path, family: str, **fields: Any) -> Any:
    """The pruned model, and its checkpoint as Transformers 4 wrote it."""
    head = "sequence" if "sequence" in CLASSES[family] else "base"
    stock = build(family, head).config
    model = prune_heads(build(family, head), UNEVEN)
    model.save_pretrained(folder)
    config = stock.to_dict() | {"architectures": [type(model).__name__]} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_is_saved_in_todays_fields(family: str, tmp_path: Path) -> None:
    model = write(tmp_path / "old", family, pruned_heads={str(layer): heads for layer, heads in UNEVEN.items()})
    inputs = batch(model)
    loaded = aligned(load_pretrained(tmp_path / "old"))
    assert numbers(loaded) == numbers(model) == [(5, 5), (3, 3)]
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    loaded.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "pruned_heads" not in saved
    assert [layer["heads"] for layer in saved["hf_attnkit"]["heads"]["layers"].values()] == [[5, 5], [3, 3]]
    again = aligned(load_pretrained(tmp_path / "new"))
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    prune_heads(again, {0: [0]})


def test_a_layer_that_lost_none_and_arguments_of_the_config(tmp_path: Path) -> None:
    head = build("bert", "sequence")
    model = prune_heads(build("bert", "sequence"), {1: [0, 7]})
    model.save_pretrained(tmp_path)
    config = head.config.to_dict() | {"architectures": ["BertForSequenceClassification"], "pruned_heads": {"1": [0, 7]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = AutoConfig.from_pretrained(tmp_path)
    loaded = aligned(load_pretrained(tmp_path, config=given))
    assert numbers(loaded) == [(8, 8), (6, 6)] and given.pruned_heads
    assert load_pretrained(tmp_path, num_labels=2, dtype="bfloat16").dtype == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"pruned_heads": {}, "num_attention_heads": 8}))
    with pytest.raises(ValueError, match="do not have the sizes"):
        load_pretrained(tmp_path)


WRONG = {
    "layer": ({"2": [0]}, r"layer 2 is out of range"),
    "layer's name": ({"first": [0]}, r"layer 'first' is no integer"),
    "head": ({"0": [8]}, r"layer 0: head 8 is out of range"),
    "head's name": ({"0": ["1"]}, r"layer 0: head '1' is no integer"),
    "twice": ({"0": [1, 1, 3]}, r"layer 0 names a head twice"),
    "all": ({"0": list(range(8))}, r"layer 0 leaves no head"),
    "no mapping": ([[0, 1]], r"must be \{layer: \[head, \.\.\.\]\}"),
    "no list": ({"0": 1}, r"must be \{layer: \[head, \.\.\.\]\}"),
    "other numbers": ({"0": [1], "1": [2]}, r"do not have the sizes .*\(7 query and 7 key/value heads\)"),
}


@pytest.mark.parametrize(("pruned", "message"), WRONG.values(), ids=WRONG)
def test_wrong_ones_are_refused(pruned: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, "bert", pruned_heads=pruned)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_families_without_it_are_refused(family: str, tmp_path: Path) -> None:
    model = build(family, "causal")
    model.save_pretrained(tmp_path)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "pruned_heads": {"0": [1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"cannot be understood for models of type '{family}'"):
        load_pretrained(tmp_path)


def test_both_ways_of_saying_it_are_refused(tmp_path: Path) -> None:
    by_layer = {"1": {"num_attention_heads": 3, "num_key_value_heads": 3}}
    others = {"num_key_value_heads": 8, "allow_global_per_layer_attribute_access": True}
    write(tmp_path, "bert", pruned_heads={"0": [1]}, per_layer_config=by_layer, **others)
    with pytest.raises(ValueError, match="and per_layer_config are both there"):
        load_pretrained(tmp_path)
