"""A plan is a conversion: the same weights, made once, for the model that it was planned for; and what it reports."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import SAMPLES, batch, build, outputs
from support.refits import plain
from support.unchanged import unchanged
from torch import Tensor, nn

import hf_attnkit.refitting.refit as refit_module
from hf_attnkit import convert_to_gqa, convert_to_mqa, last_change, plan_gqa, restore_attention, swap_attention
from hf_attnkit.conversion import METHODS
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.layers import projected_layers
from hf_attnkit.refitting.options import REFITS


def many(model: Any, count: int = 6) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# One path.


# Each method with two refits, each refit with two methods at least: neither knows of the other.
COMBINATIONS = [
    (method, list(REFITS)[(number + step) % len(REFITS)], grouping)
    for number, method in enumerate(METHODS)
    for step, grouping in enumerate(["adjacent", "adjacent" if method == "random" else "best"])
]


@pytest.mark.parametrize(("method", "refit", "grouping"), COMBINATIONS)
def test_converting_is_applying_a_plan(method: str, refit: str, grouping: str) -> None:
    model = build("llama", kv_heads=4)
    options = {"method": method, "refit": refit, "grouping": grouping}
    torch.manual_seed(3)
    one = convert_to_gqa(copy.deepcopy(model), 2, calibration=many(model), **options)
    torch.manual_seed(3)
    with unchanged(model):
        plan = plan_gqa(model, 2, calibration=iter(many(model)), **options)
    assert plan.report is None and plan.apply() is model
    assert same(one, model)
    assert str(plan.report) == str(last_change(model)) == str(last_change(one))
    assert plan.refit == refit and (plan.report.refit is None) == (refit == "none")


@pytest.mark.parametrize("options", [{"budget": 0.3}, {"budget": 0.3, "uniform": False}, {}], ids=str)
def test_converting_with_a_budget_or_by_default_is_applying_a_plan(options: dict[str, Any]) -> None:
    model = build("llama")
    one = convert_to_gqa(copy.deepcopy(model), calibration=many(model), **options)
    assert same(one, plan_gqa(model, calibration=many(model), **options).apply())


@pytest.mark.parametrize("family", ["bert", "llama", "qwen3", "phi3"])
def test_without_a_method_it_is_pca_with_refit_where_there_are_batches_and_else_mean(family: str) -> None:
    model = build(family, kv_heads=4 if SAMPLES[family].grouped else None)
    keys = "mean" if family == "qwen3" else "pca"
    plans = {
        "none": (plan_gqa(model, 2), ("mean", "mean", "none")),
        "batches": (plan_gqa(model, 2, calibration=many(model)), ("pca", keys, "full")),
        "batches, no refit": (plan_gqa(model, 2, calibration=many(model), refit="none"), ("pca", keys, "none")),
        "moments": (
            plan_gqa(model, 2, calibration=collect(model, projected_layers(model), many(model))),
            ("pca", keys, "none"),
        ),
        "method": (plan_gqa(model, 2, method="mean", calibration=many(model)), ("mean", "mean", "full")),
    }
    for name, (plan, expected) in plans.items():
        assert (plan.method, plan.key_method, plan.refit) == expected, name
    explicit = convert_to_gqa(
        copy.deepcopy(model), 2, method="pca", key_method=keys, calibration=many(model), refit="full"
    )
    assert same(convert_to_gqa(copy.deepcopy(model), 2, calibration=many(model)), explicit)


def test_the_older_spellings_of_refit_mean_what_they_did() -> None:
    model = build("bert")
    for old, new in ((True, "full"), (False, "none")):
        a, b = (convert_to_gqa(copy.deepcopy(model), 2, calibration=many(model), refit=word) for word in (old, new))
        assert same(a, b)


def test_to_one_head_passes_everything_on() -> None:
    model = build("qwen3", kv_heads=2)
    options = {"method": "pca", "key_method": "first", "calibration": many(model), "refit": "scale"}
    a = convert_to_mqa(copy.deepcopy(model), **options)
    assert same(a, convert_to_gqa(copy.deepcopy(model), 1, **options))
    report = last_change(a)
    assert (report.method, report.key_method, report.refit.fits) == ("pca", "first", "scale")


def test_calibration_makes_predicted_losses_those_of_the_data_whatever_the_method() -> None:
    model = build("llama")
    blind, seen = (plan_gqa(model, 2, method="mean", refit=False, **options) for options in
                   ({}, {"calibration": many(model)}))  # fmt: skip
    assert blind.num_tokens is None and seen.num_tokens == 180
    assert all(a.key_loss != b.key_loss for a, b in zip(blind.layers, seen.layers, strict=True))
    assert same(blind.apply(), plan_gqa(build("llama"), 2).apply())


# For this model, as it is now.


def replaced(model: Any) -> None:
    attention = projected_layers(model)[1].module
    other = nn.Linear(64, 64)
    other.weight, other.bias = attention.query.weight, attention.query.bias
    attention.query = other


def write(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[0] += 1


def set_data(parameter: nn.Parameter, how: Callable[[Tensor], Tensor]) -> None:
    parameter.data.copy_(how(parameter.data))


def projection(model: Any, name: str = "key") -> nn.Linear:
    linear: nn.Linear = getattr(projected_layers(model)[1], name)
    return linear


STALE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight": (lambda m: write(projection(m).weight), r"'encoder.layer.1.attention.self.key.weight' was written"),
    "bias": (lambda m: write(projection(m, "output").bias), r"attention.output.dense.bias' was written"),
    "weight behind PyTorch's back": (
        lambda m: set_data(projection(m).weight, lambda w: w * 1.01),
        r"parameters of 'encoder.layer.1.attention.self.key' were written",
    ),
    "rows exchanged behind PyTorch's back": (
        lambda m: set_data(projection(m).weight, lambda w: w.flip(0)),
        r"self.key' were written",
    ),
    "columns exchanged behind PyTorch's back": (
        lambda m: set_data(projection(m).weight, lambda w: w.flip(1)),
        r"self.key' were written",
    ),
    "bias behind PyTorch's back": (
        lambda m: set_data(projection(m).bias, lambda b: b.flip(0)),
        r"self.key' were written",
    ),
    "another layer's weights": (lambda m: write(m.encoder.layer[0].output.dense.weight), r"layer.0.output.dense.weig"),
    "parameter": (
        lambda m: setattr(projection(m), "weight", nn.Parameter(projection(m).weight.detach().clone())),
        r"self.key.weight' was replaced",
    ),
    "module": (replaced, "layer 1: the query module was replaced"),
    "half": (lambda m: m.half(), r"had the dtype torch.float32 and has torch.float16"),
    "double": (lambda m: m.double(), r"has torch.float64"),
    "embeddings": (
        lambda m: m.resize_token_embeddings(103, mean_resizing=False),
        r"word_embeddings.weight' had the shape .*99, 64.*103, 64",
    ),
    "a parameter more": (
        lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))),
        "added or removed, 'extra'",
    ),
    "swap": (lambda m: swap_attention(m, "sliding_window", window=2), r"ran 'sdpa', and runs .*sliding_window"),
    "implementation": (lambda m: m.set_attn_implementation("eager"), r"ran 'sdpa', and runs 'eager'"),
    "converted": (lambda m: convert_to_gqa(m, 4), "layer 0: num_key_value_heads was 8 and is 4"),
    "more layers": (lambda m: m.encoder.layer.append(copy.deepcopy(m.encoder.layer[0])), "removed, 'encoder.layer.2"),
    "fewer layers": (lambda m: m.encoder.layer.pop(1), "added or removed, 'encoder.layer.1"),
}


@pytest.mark.parametrize("change", STALE)
def test_a_plan_for_another_model_is_refused_and_changes_nothing(change: str) -> None:
    model = build("bert")
    plan = plan_gqa(model, 2)
    make, message = STALE[change]
    make(model)
    with unchanged(model), pytest.raises(ValueError, match=f"no longer what the plan was made for: .*{message}.*new"):
        plan.apply()
    assert plan.report is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_model_that_moved_to_another_device_is_refused() -> None:
    model = build("bert")
    plan = plan_gqa(model, 2)
    with pytest.raises(ValueError, match="had the device cpu and has cuda:0"):
        plan_gqa(model.to("cuda"), 2) and plan.apply()


def test_what_does_not_matter_to_the_heads_stays_as_it_was_set_since() -> None:
    model = build("bert", "sequence")
    plan = plan_gqa(model, 2)
    model.config.id2label = {0: "no", 1: "yes"}
    model.config.hidden_dropout_prob = 0.25
    model.train()
    calls = []
    layer = projected_layers(model)[0]
    layer.module.note = "of the user"
    layer.query.register_forward_hook(lambda *_: calls.append(1))
    layer.key.weight.requires_grad_(False)
    layer.value.bias.requires_grad_(False)
    swap_attention(model, "flash")
    restore_attention(model)
    plan.apply()
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.hidden_dropout_prob == 0.25
    assert model.training and layer.module.note == "of the user"
    assert not layer.key.weight.requires_grad and not layer.value.bias.requires_grad
    assert layer.key.bias.requires_grad and layer.query.weight.requires_grad
    outputs(model, batch(model))
    assert calls
    assert same(model, convert_to_gqa(build("bert", "sequence"), 2))


def test_a_plan_is_applied_once_and_then_holds_neither_old_weights_nor_batches() -> None:
    model = build("llama")
    batches = many(model)
    kept = weakref.ref(batches[0]["input_ids"])
    old = weakref.ref(projected_layers(model)[0].key.weight)
    plan = plan_gqa(model, 2, calibration=batches)
    del batches
    assert kept() is not None
    plan.apply()
    gc.collect()
    assert kept() is None and old() is None
    with unchanged(model), pytest.raises(ValueError, match="applied already"):
        plan.apply()


def test_without_a_refit_no_batch_is_kept() -> None:
    model = build("llama")
    seen = []

    def stream() -> Any:
        for inputs in many(model):
            seen.append(weakref.ref(inputs["input_ids"]))
            yield inputs

    plan = plan_gqa(model, 2, calibration=stream(), refit="none")
    gc.collect()
    assert plan.num_tokens == 180 and len(seen) == 6 and not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("refit", ["output", "full", "scale"])
def test_a_plan_whose_refit_fails_can_be_applied_again(refit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = convert_to_gqa(copy.deepcopy(model), 2, calibration=many(model), refit=plain(refit))
    plan = plan_gqa(model, 2, calibration=many(model), refit=plain(refit))
    refitted = refit_module.solve if refit != "scale" else refit_module.scaled
    calls: list[int] = []

    def second_fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return refitted(*args, **options) if len(calls) == 1 else 1 / 0  # after layer 0 was fitted

    with monkeypatch.context() as patch, unchanged(model), pytest.raises(ZeroDivisionError):
        patch.setattr(refit_module, refitted.__name__, second_fails)
        plan.apply()
    assert plan.report is None and last_change(model) is None
    assert same(plan.apply(), expected)
