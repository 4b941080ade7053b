"""Layers of models found by running that lost all of their heads: they add a bias at most, and all else still works."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.any_model import any_model, zeroed
from support.every_type import small_model
from support.unchanged import unchanged
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import (
    convert_to_gqa,
    describe_attention,
    head_importance,
    last_change,
    load_pretrained,
    prune_heads,
    select_heads,
    swap_attention,
)
from hf_attnkit.attention.cache_bytes import cache_bytes_per_token
from hf_attnkit.models.discovery import discover, run_outputs
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.models.ownership import ownerships

# Attentions that lose all of their heads: those that share a position bias lose them together.
EMPTIED = {"gpt2": [0], "opt": [0], "gemma2": [0], "mixtral": [0], "gpt_oss": [0], "modernbert": [0], "never seen": [1],
           "t5": [0, 1], "bart": [0, 5], "mpnet": [0, 1], "deberta-v2": [0], "gpt_bigcode": [0],
           "deepseek_v3": [1]}  # fmt: skip
FEW = ["gpt2", "mixtral", "t5"]


def everything(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, list[int]]:
    found = discover(model).attentions
    return {index: list(range(found[index].num_heads)) for index in layers}


def emptied(model_type: str) -> PreTrainedModel:
    model = any_model(model_type)
    return prune_heads(model, everything(model, EMPTIED[model_type]))


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    return discover(model).inputs


@torch.no_grad()
def out(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    return run_outputs(model, inputs)


@pytest.mark.parametrize("model_type", EMPTIED)
def test_equals_zeroing_and_reloads(model_type: str, tmp_path: Path) -> None:
    model = any_model(model_type)
    if not hasattr(model.config, "num_experts_per_tok") and model.config._attn_implementation == "sdpa":
        model = model.double()
    found, heads = discover(model), everything(model, EMPTIED[model_type])
    untouched = out(model, found.inputs)
    with zeroed(model, found, ownerships(model, found.attentions), heads):
        want = out(model, found.inputs)
    prune_heads(model, heads)
    got = out(model, found.inputs)
    tolerance = 1e-11 if model.dtype == torch.float64 else 1e-5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max())))
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(untouched, want, strict=True))
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(model)).eval()
    for each in (model, again):
        assert [layer.index for layer in attention_layers(each) if layer.is_empty] == EMPTIED[model_type]
    assert all(torch.equal(a, b) for a, b in zip(out(again, found.inputs), got, strict=True))


@pytest.mark.parametrize("model_type", FEW)
def test_what_is_saved(model_type: str, tmp_path: Path) -> None:
    """Also where every layer of the config has one head, which Transformers' own fields could say."""
    model = emptied(model_type)
    rest = {layer.index: list(layer.heads)[1:] for layer in attention_layers(model) if not layer.is_empty}
    prune_heads(model, rest)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["hf_attnkit"]["heads"]["layers"]
    assert {tuple(layer["heads"]) for layer in record.values()} == {(0, 0), (1, 1)}
    again = load_pretrained(tmp_path, type(model)).eval()
    assert [len(layer.heads) for layer in attention_layers(again)] == [
        int(layer.index not in EMPTIED[model_type]) for layer in attention_layers(model)
    ]


@pytest.mark.parametrize("model_type", FEW)
def test_it_stays_zero_in_training(model_type: str) -> None:
    model = emptied(model_type).train()
    inputs = inputs_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        sum(each.sum() for each in run_outputs(model, inputs)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    for layer in attention_layers(model):
        weights = {name: p for name, p in layer.module.named_parameters() if p.dim() > 1 and "bias" not in name}
        if layer.is_empty:
            assert not any(p.any() for name, p in weights.items()), layer.name
        else:
            assert all(p.any() for p in weights.values()), layer.name


@pytest.mark.parametrize("model_type", FEW)
def test_scores_selection_and_report(model_type: str) -> None:
    model, before = any_model(model_type), attention_layers(any_model(model_type))
    bytes_before = cache_bytes_per_token(model)
    prune_heads(model, everything(model, EMPTIED[model_type]))
    change = last_change(model)
    assert change is not None and all(change.heads_after[index] == (0, 0) for index in EMPTIED[model_type])
    assert change.heads_before[0] == (before[0].num_heads, before[0].num_key_value_heads)
    assert bytes_before > change.bytes_after == cache_bytes_per_token(model)  # type: ignore[attr-defined]
    inputs = inputs_of(model)
    for method in ("entropy", "contribution", "magnitude", "random"):
        scores = head_importance(model, [inputs], method=method)
        for index, row in enumerate(scores):
            assert row.isnan().all() if index in EMPTIED[model_type] else row.isfinite().any()
    chosen = select_heads(scores, num_heads=2, model=model)
    assert chosen and not chosen.keys() & set(EMPTIED[model_type])
    index = EMPTIED[model_type][0]
    with unchanged(model), pytest.raises(ValueError, match=rf"layer {index} has no heads left, so \[0\]"):
        prune_heads(model, {index: [0]})
    with unchanged(model), pytest.raises(ValueError, match=r"have no heads left.*convert first"):
        convert_to_gqa(model, 1)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_it_is_described(model_type: str) -> None:
    rows = describe_attention(emptied(model_type)).rows
    assert [row.num_heads == row.num_key_value_heads == 0 for row in rows] == [
        index in EMPTIED[model_type] for index in range(len(rows))
    ]
    assert "no heads left; convert first" in rows[EMPTIED[model_type][0]].convert


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bart"])
def test_generates(model_type: str) -> None:
    """The tokens of the model whose heads are zeroed, and of a swapped one."""
    whole = any_model(model_type)
    heads, found = everything(whole, EMPTIED[model_type]), discover(whole)
    inputs = {"input_ids": found.inputs["input_ids"][1:], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with zeroed(whole, found, ownerships(whole, found.attentions), heads):
        want = whole.generate(**inputs)
    model = prune_heads(copy.deepcopy(whole), heads)
    assert torch.equal(model.generate(**inputs), want)
    assert torch.equal(swap_attention(model, "flash").generate(**inputs), want)


@pytest.mark.parametrize("refit", ["output", "scale"])
@pytest.mark.parametrize("model_type", ["gpt2", "bart"])
def test_a_refit_keeps_it_empty(model_type: str, refit: str) -> None:
    model = any_model(model_type)
    inputs = inputs_of(model)
    prune_heads(model, everything(model, EMPTIED[model_type]), calibration=[inputs], refit=refit)
    for layer in attention_layers(model):
        assert layer.is_empty == (layer.index in EMPTIED[model_type]) and layer.is_empty != bool(
            layer.output.weight.any()
        )


def test_a_part_knows_it(tmp_path: Path) -> None:
    for model_type, part in (("t5", "encoder"), ("bart", "model.encoder"), ("clip", "text_model")):
        model = small_model(model_type)
        inside = model.get_submodule(part)
        first = [i for i, each in enumerate(discover(inside).attentions) if model_type == "t5" or i == 0]
        prune_heads(inside, everything(inside, first))  # type: ignore[arg-type]
        model.save_pretrained(tmp_path / model_type)
        again = load_pretrained(tmp_path / model_type, type(model)).eval()
        for each in (model, again):
            layers = attention_layers(each.get_submodule(part))
            assert [layer.index for layer in layers if layer.is_empty] == first, model_type


def test_a_bypassing_layer_of_one_head_keeps_its_number(tmp_path: Path) -> None:
    """A module with one head says no more that it attends by heads."""
    model = prune_heads(small_model("gptj"), {0: [0, 2, 3]})
    assert [len(layer.heads) for layer in attention_layers(model)] == [1, 4]
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, type(model)).eval()
    prune_heads(again, {0: [0]})
    assert [len(layer.heads) for layer in attention_layers(again)] == [0, 4]


def test_what_would_bring_heads_back_is_refused() -> None:
    model = emptied("opt")
    with torch.no_grad():
        attention_layers(model)[0].output.weight[3, 2] = 0.5
    with unchanged(model), pytest.raises(ValueError, match=r"layer 0 .*has no heads, but its attention adds more"):
        head_importance(model, method="random")


def test_a_stand_in_that_is_not_proven_is_undone() -> None:
    """An output projection that adds something of its own when one head comes in."""
    model = small_model("opt")
    output = model.model.decoder.layers[0].self_attn.out_proj

    def odd(x: Tensor) -> Tensor:
        return torch.nn.Linear.forward(output, x) + x.shape[-1]

    output.forward = odd
    with unchanged(model), pytest.raises(ValueError, match="differs from that of the uncut model"):
        prune_heads(model, {0: range(4)})
