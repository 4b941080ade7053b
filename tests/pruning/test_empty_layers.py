"""Layers that lost all of their heads: they add only a bias, and the model runs, caches, saves and is pruned again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.models import DECODERS, EDITABLE, aligned, batch, build, outputs
from support.pruned import assert_same, numbers, zeroed
from support.refits import plain
from support.unchanged import unchanged
from transformers import PreTrainedModel

from hf_attnkit import (
    convert_to_gqa,
    head_importance,
    load_pretrained,
    plan_gqa,
    prune_heads,
    select_heads,
    swap_attention,
)
from hf_attnkit.models.layers import attention_layers

EVERY_HEAD_OF_0 = {0: list(range(8))}
# Where the forward reads one config for all layers, only all of them together can be emptied.
UNEVEN = [family for family in EDITABLE if family != "phi3"]
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


def emptied(family: str, head: str = "base", **options: Any) -> PreTrainedModel:
    """The first layer, which the cache's length is asked of, without heads; two heads fewer in the second."""
    return prune_heads(build(family, head, **options), EVERY_HEAD_OF_0 | {1: [2, 5]})


@pytest.mark.parametrize("family", UNEVEN)
def test_equals_zeroing_and_reloads(family: str, tmp_path: Path) -> None:
    original = build(family)
    model = emptied(family)
    assert [len(layer.heads) for layer in attention_layers(model)] == [0, 6]
    inputs = batch(model)
    assert_same(model, zeroed(original, EVERY_HEAD_OF_0 | {1: [2, 5]}), inputs)
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert [layer.is_empty for layer in attention_layers(again)] == [True, False]
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    for name in ("mha", "flash"):
        assert_same(swap_attention(copy.deepcopy(model), name), model, inputs)


@pytest.mark.parametrize("family", EDITABLE)
def test_every_layer(family: str, tmp_path: Path) -> None:
    model = build(family)
    everything = {0: range(8), 1: range(8)}
    reference = zeroed(model, {0: list(range(8)), 1: list(range(8))})
    prune_heads(model, everything)
    assert_same(model, reference, batch(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(aligned(load_pretrained(tmp_path)), batch(model)), outputs(model, batch(model)))


def test_one_layer_is_refused_where_the_forward_reads_the_config() -> None:
    model = build("phi3")
    with unchanged(model), pytest.raises(ValueError, match="all layers must lose the same heads"):
        prune_heads(model, EVERY_HEAD_OF_0)


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_what_is_saved(family: str, tmp_path: Path) -> None:
    emptied(family).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [layer["heads"] for layer in saved["hf_attnkit"]["heads"]["layers"].values()] == [[0, 0], [6, 6]]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("family", ["bert", "gemma", *DECODERS])
def test_generates(family: str, options: dict) -> None:
    """Left-padded, the tokens and scores of the model whose heads are zeroed."""
    if family == "bert" and "cache_implementation" in options:
        pytest.skip("Transformers' BERT takes no static cache")
    model = emptied(family, "causal")
    reference = zeroed(build(family, "causal"), EVERY_HEAD_OF_0 | {1: [2, 5]})
    inputs = {key: batch(model, (11, 6))[key] for key in ("input_ids", "attention_mask")}
    settings = SETTINGS | options | {"output_scores": True, "return_dict_in_generate": True}
    found, plain, exact = (
        m.generate(**inputs, **settings) for m in (model, reference, copy.deepcopy(reference).double())
    )
    assert torch.equal(found.sequences, plain.sequences) and torch.equal(plain.sequences, exact.sequences)
    for scores in zip(found.scores, plain.scores, exact.scores, strict=True):
        assert_as_accurate(*scores, terms=96)


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_the_stand_in_costs_one_head_and_stays_zero_in_training(family: str) -> None:
    model = emptied(family, "sequence").train()
    layer = attention_layers(model)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    inputs = batch(model)
    for _ in range(2):
        model(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    cut = [p for p in layer.module.parameters() if p.dim() == 2 and min(p.shape) == layer.head_dim]
    assert len({id(weight) for weight in [*cut, layer.output.weight]}) == 4
    assert not any(weight.any() for weight in [*cut, layer.output.weight])
    if layer.output.bias is not None:
        assert layer.output.bias.any()
    assert attention_layers(model)[0].is_empty and prune_heads(model.eval(), {1: [0]}) is model


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_scores_selection_and_pruning_again(family: str) -> None:
    model = emptied(family)
    for method, batches in (("entropy", [batch(model)]), ("magnitude", None), ("random", None)):
        scores = head_importance(model, batches, method=method)
        assert scores.shape == (2, 6) and scores[0].isnan().all() and scores[1].isfinite().all()
    selection = select_heads(scores, fraction=0.5)
    assert set(selection) == {1} and len(selection[1]) == 3
    prune_heads(model, selection)
    assert numbers(model) == [(1, 1), (3, 3)]
    with unchanged(model), pytest.raises(ValueError, match=r"layer 0 has no heads left, so \[0\] cannot be removed"):
        prune_heads(model, {0: [0], 1: [0]})
    rest = select_heads(head_importance(model, method="random"), num_heads=3, min_heads=0)
    prune_heads(model, rest)
    assert [layer.is_empty for layer in attention_layers(model)] == [True, True]
    with unchanged(model), pytest.raises(ValueError, match="layer 1 has no heads left"):
        prune_heads(model, {1: [0]})


def test_what_was_one_head_is_removed_once() -> None:
    """A real last head and a stand-in have the same shapes: only the config tells them apart."""
    model = prune_heads(build("bert"), {0: range(1, 8)})
    assert numbers(model) == [(1, 1), (8, 8)] and not attention_layers(model)[0].is_empty
    reference = zeroed(model, {0: [0]})
    prune_heads(model, {0: [0]})
    assert attention_layers(model)[0].is_empty
    assert_same(model, reference, batch(model))


@pytest.mark.parametrize("method", ["output", "scale"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_refit_keeps_it_empty(method: str, family: str) -> None:
    """Only a bias is left to fit: it becomes the mean of what the untouched attention gave."""
    original = build(family).double()
    batches = [batch(original, seed=seed) for seed in range(4)]
    model = prune_heads(copy.deepcopy(original), EVERY_HEAD_OF_0, calibration=batches, refit=plain(method))
    empty, old = attention_layers(model)[0], attention_layers(original)[0]
    assert empty.is_empty and not empty.output.weight.any()
    if empty.output.bias is not None and method == "output":
        seen = []
        old.output.register_forward_hook(lambda module, args, output: seen.append(output))
        for inputs in batches:
            original(**inputs)
        real = torch.cat([y[i["attention_mask"].bool()] for y, i in zip(seen, batches, strict=True)])
        torch.testing.assert_close(empty.output.bias, real.mean(0), rtol=1e-10, atol=1e-10)
    again = prune_heads(model, {1: [0]}, calibration=batches, refit=plain(method))
    assert attention_layers(again)[0].is_empty and outputs(again, batches[0]).isfinite().all()


def test_grouped_layers() -> None:
    model = convert_to_gqa(build("llama"), 2)
    reference = zeroed(model, EVERY_HEAD_OF_0)
    prune_heads(model, EVERY_HEAD_OF_0)
    assert numbers(model) == [(1, 1), (8, 2)]
    assert_same(model, reference, batch(model))


def test_what_would_bring_heads_back_is_refused() -> None:
    model = emptied("llama")
    for call in (lambda: convert_to_gqa(model, 1), lambda: plan_gqa(model, budget=0.5)):
        with unchanged(model), pytest.raises(ValueError, match=r"layers \[0\] have no heads left.*convert first"):
            call()
    with torch.no_grad():
        attention_layers(model)[0].output.weight[3, 2] = 0.5
    with unchanged(model), pytest.raises(ValueError, match=r"layer 0 .*no heads.*make the weight .* zero again"):
        prune_heads(model, {1: [0]})
