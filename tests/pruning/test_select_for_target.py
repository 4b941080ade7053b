"""Selections for a share of the time or of the parameters."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.models import batch, build
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, head_importance, prune_heads, select_for_target, select_heads
from hf_attnkit.models.layers import attention_layers, projected_layers
from hf_attnkit.pruning import select_for_target as targets


def scores(model: Any) -> torch.Tensor:
    return head_importance(model, method="random", seed=3)


def size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("groups", ["whole", "across"])
@pytest.mark.parametrize("family", ["bert", "llama", "phi", "vit"])
def test_counted_parameters_are_those_of_the_pruned_model(family: str, groups: str) -> None:
    """After every number of removed heads, also of all of a layer and after a first pruning."""
    original = convert_to_gqa(build(family), 4)
    selection = select_heads(scores(original), num_heads=4, num_key_value_heads=4, groups=groups)
    for model in (original, prune_heads(copy.deepcopy(original), selection)):
        layers = projected_layers(model)
        counts = [layer.num_key_value_heads for layer in layers]
        total = sum(len(layer.heads) for layer in layers)
        for number in range(4, total + 1, 4):
            options = {"num_key_value_heads": counts, "groups": groups, "min_heads": 0}
            chosen = select_heads(scores(model), num_heads=number, **options)
            pruned = prune_heads(copy.deepcopy(model), chosen)
            assert targets.parameter_share(model, chosen) == pytest.approx(size(pruned) / size(model), rel=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama", "phi3"])
def test_fewest_heads_for_a_number_of_parameters(family: str) -> None:
    model = build(family)
    per_layer = family == "phi3"  # its layers must stay alike
    importance = scores(model)
    with unchanged(model):
        chosen = select_for_target(model, importance, parameters=0.85, per_layer=per_layer)
    number = sum(map(len, chosen.values()))
    count = number // 2 if per_layer else number
    assert chosen == select_heads(importance, num_heads=count, per_layer=per_layer)
    fewer = select_heads(importance, num_heads=count - 1, per_layer=per_layer)
    shares = [size(prune_heads(copy.deepcopy(model), heads)) / size(model) for heads in (chosen, fewer)]
    assert shares[0] <= 0.85 < shares[1]


@pytest.mark.parametrize("target", [0.5, 0.75, 0.95])
def test_fewest_heads_for_a_time(target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which a head takes a share of 1 / 32, and the rest of the model half of the time."""
    model = build("bert")
    importance, tries = scores(model), []

    def forward_share(one: Any, other: Any, inputs: list, repeats: int) -> float:
        assert one is model and other is not model and len(inputs) == 2 and repeats == 7
        tries.append(sum(len(layer.heads) for layer in attention_layers(other)))
        return 0.5 + tries[-1] / 32

    monkeypatch.setattr(targets, "forward_share", forward_share)
    batches = (batch(model, seed=seed) for seed in range(2))
    with unchanged(model):
        chosen = select_for_target(model, importance, batches, latency=target, repeats=7, min_heads=0)
    number = sum(map(len, chosen.values()))
    assert 0.5 + (16 - number) / 32 <= target < 0.5 + (17 - number) / 32
    assert chosen == select_heads(importance, num_heads=number, min_heads=0) and len(tries) <= 6
    with pytest.raises(ValueError, match=r"latency=0\.55 cannot be reached: .*min_heads=1.* 0\.5625; ask for a larger"):
        select_for_target(model, importance, [batch(model)] * 2, latency=0.55, repeats=7)


def test_medians_of_runs_in_turn() -> None:
    """The clock is read before and after every run: the first of each is left out, an interruption has no effect."""
    model, other = build("bert"), build("bert").train()
    runs: list[Any] = []
    for one in (model, other):
        one.register_forward_hook(lambda module, args, output: runs.append((module, module.training)))
    durations = [99.0, 99.0, 2.0, 1.0, 2.0, 1.0, 50.0, 1.5]
    times = itertools.accumulate(t for duration in durations for t in (1.0, duration))
    share = targets.forward_share(model, other, [batch(model)] * 2, 3, clock=lambda: next(times))
    assert share == 0.5 and next(times, None) is None
    assert runs == [(model, False)] * 2 + [(other, False)] * 2 + runs[4:] and len(runs) == 16 and other.training


def test_a_real_clock() -> None:
    """Without most of its attention a model of long inputs is faster; the margin is far from what noise does."""
    model = build("bert", max_position_embeddings=512, intermediate_size=8)
    inputs = batch(model, (512, 512))
    pruned = prune_heads(copy.deepcopy(model), {0: range(1, 8), 1: range(1, 8)})
    assert 0 < targets.forward_share(model, pruned, [inputs], 5) < 0.8


BAD = {
    "neither": ({}, "exactly one of latency and parameters"),
    "both": ({"latency": 0.5, "parameters": 0.5}, "exactly one of"),
    "latency 1": ({"latency": 1.0}, r"latency=1\.0 must be a number above 0 and below 1"),
    "parameters 0": ({"parameters": 0}, "parameters=0 must be a number above 0"),
    "parameters bool": ({"parameters": True}, "parameters=True"),
    "parameters text": ({"parameters": "0.5"}, r"parameters='0\.5'"),
    "no batches": ({"latency": 0.5}, "latency is measured; give batches"),
    "empty batches": ({"latency": 0.5, "batches": []}, "batches is empty"),
    "batches for nothing": ({"parameters": 0.9, "batches": [{}]}, "batches would have no effect"),
    "a batch of its own kind": ({"latency": 0.5, "batches": [3]}, "must be a mapping"),
    "repeats": ({"latency": 0.5, "batches": [{}], "repeats": 0}, "repeats=0"),
    "out of reach": (
        {"parameters": 0.1},
        r"parameters=0\.1 cannot be reached: .* the share is 0\.\d+; ask for a larger",
    ),
    "groups": ({"parameters": 0.9, "groups": "all"}, "groups='all'"),
    "min_heads": ({"parameters": 0.9, "min_heads": -1}, "min_heads=-1"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options: dict, message: str) -> None:
    model = build("bert")
    with unchanged(model), pytest.raises(ValueError, match=message):
        select_for_target(model, scores(model), **options)


def test_scores_of_another_model() -> None:
    model = build("bert")
    importance = scores(model)
    prune_heads(model, {0: [0]})
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"importance has \[8, 8\] heads in its layers, the model \[7, 8\]"),
    ):
        select_for_target(model, importance, parameters=0.9)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "t5", "mpnet", "deberta-v2", "gpt_oss"])
def test_counted_parameters_of_models_found_by_running(model_type: str) -> None:
    """Also where a position bias goes with the heads, and where a layer loses all of them."""
    model = small_model(model_type)
    importance = scores(model)
    for number in (4, 8):
        chosen = select_heads(importance, num_heads=number, model=model, min_heads=0)
        pruned = prune_heads(copy.deepcopy(model), chosen)
        assert targets.parameter_share(model, chosen) == pytest.approx(size(pruned) / size(model), rel=1e-12)
    chosen = select_heads(importance, num_heads=4, model=model)
    target = size(prune_heads(copy.deepcopy(model), chosen)) / size(model) + 1e-9
    with unchanged(model):
        assert select_for_target(model, importance, parameters=target) == chosen
