"""Gradient descent on a layer's own error: what is lowered, what is chosen, and what must stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor

import hf_attnkit.refitting.guard as guard_module
from hf_attnkit import RefitOptions, convert_to_gqa, last_change, prune_heads
from hf_attnkit.models.layers import projected_layers
from hf_attnkit.observing.walk import Walk
from hf_attnkit.refitting.descent import Aim, descend

PASSES = RefitOptions("descent", descent_passes=3, query_steps=1)


def many(model: Any, count: int = 8) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


def error(model: Any, original: Any, batches: list[dict[str, Tensor]]) -> float:
    """Written out, of the first layer: both get the same input there."""
    found: list[list[Tensor]] = [[], []]
    for parts, each in zip(found, (model, original), strict=True):
        handle = projected_layers(each)[0].output.register_forward_hook(
            lambda _, args, out, parts=parts: parts.append(out.detach())
        )
        for inputs in batches:
            with torch.no_grad():
                each(**inputs)
        handle.remove()
    masks = [inputs["attention_mask"].bool() for inputs in batches]
    now, was = (torch.cat([x[m] for x, m in zip(parts, masks, strict=True)]) for parts in found)
    return float((now - was).square().sum() / was.square().sum())


@pytest.mark.parametrize("family", ["bert", "llama", "phi3"])
def test_a_layer_comes_nearer_by_definition(family: str) -> None:
    original = build(family)
    batches = many(original)
    options = RefitOptions("descent", descent_passes=3, query_steps=1, held_out=0.0)
    fitted = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=options)
    before = RefitOptions("full", query_steps=1, held_out=0.0)
    full = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=before)
    report = last_change(fitted).refit  # type: ignore[union-attr]
    assert report.layers[0].descent[0] == pytest.approx(error(full, original, batches), rel=1e-4)
    assert report.layers[0].descent[1] == pytest.approx(error(fitted, original, batches), rel=1e-4)
    assert all(after < 0.97 * first for first, after in (layer.descent for layer in report.layers))
    for name in ("query", "key", "value", "output"):
        now, was = (getattr(projected_layers(model)[0], name).weight for model in (fitted, full))
        assert not torch.equal(now, was) and now.requires_grad == was.requires_grad, name
    rest = {id(p) for layer in projected_layers(fitted) for m in (layer.query, layer.key, layer.value, layer.output)
            for p in m.parameters()}  # fmt: skip
    for (name, now), was in zip(fitted.named_parameters(), original.parameters(), strict=True):
        assert now.grad is None and (id(now) in rest or torch.equal(now, was)), name
    assert "descent" in str(last_change(fitted))


def test_one_key_value_head_is_fitted_too() -> None:
    original = build("llama")
    batches = many(original)
    fitted, full = (
        convert_to_gqa(copy.deepcopy(original), 1, method="mean", calibration=batches, refit=options)
        for options in (PASSES, RefitOptions("full", query_steps=1))
    )
    for now, was in zip(projected_layers(fitted), projected_layers(full), strict=True):
        for name in ("query", "key", "value", "output"):
            assert not torch.equal(getattr(now, name).weight, getattr(was, name).weight), name


def aims(model: Any, target: Tensor, unseen: Tensor) -> list[Aim]:
    inputs = {"input_ids": torch.arange(5, 35).view(3, 10)}
    return [Aim(Walk(model, inputs), target, 1 - unseen, unseen)]


def test_the_pass_that_is_best_unseen_stays() -> None:
    """Where what is unseen asks for the opposite of what is fitted, nothing changes; and what is kept is reported."""
    torch.manual_seed(0)
    model = build("bert")
    layer = projected_layers(model)[0]
    now = aims(model, torch.zeros(1), torch.zeros(1))[0].walk.seen(0, layer.output).output.detach()
    unseen = torch.zeros(3, 10)
    unseen[2] = 1
    modules = [layer.query, layer.key, layer.value, layer.output]
    kept = [p for module in modules for p in (module.weight, module.bias)]
    values = [p.detach().clone() for p in kept]
    target = now.clone()
    target[:2] += torch.randn(now[:2].shape)  # what is unseen is exact already
    assert descend(model, layer, modules, aims(model, target, unseen), 4) == (0.0, 0.0)
    for module in modules:
        assert torch.equal(module.weight, values[2 * modules.index(module)])
    target = now + torch.randn(4, now.shape[2])[torch.arange(30).view(3, 10) % 4]
    first, least = descend(model, layer, modules, aims(model, target, unseen), 4)
    again = aims(model, target, unseen)[0].walk.seen(0, layer.output).output
    assert least < first
    assert float((again - target)[2].square().sum() / target[2].square().sum()) == pytest.approx(least, rel=1e-5)
    # Whoever holds the parameters from before can put them back.
    assert all(torch.equal(parameter, value) for parameter, value in zip(kept, values, strict=True))


def test_a_descent_that_harms_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = build("llama")
    batches = many(original)
    merged = convert_to_gqa(copy.deepcopy(original), 2, method="mean")

    said = iter([True, False])  # worse than none, and none not worse than it
    monkeypatch.setattr(guard_module, "is_worse", lambda *_: next(said))
    fitted = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=PASSES)
    report = last_change(fitted).refit  # type: ignore[union-attr]
    assert report.kept == "none" and set(report.held_out.errors) == {"none", "descent"}
    for (name, now), was in zip(fitted.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(now, was), name


def test_models_in_16_bits_come_nearer_too() -> None:
    original = build("bert").bfloat16()
    report = last_change(convert_to_gqa(original, 2, method="mean", calibration=many(original), refit=PASSES)).refit  # type: ignore[union-attr]
    found = [layer.descent for layer in report.layers]
    assert all(after <= first for first, after in found) and any(after < first for first, after in found)
    assert {p.dtype for p in original.parameters()} == {torch.bfloat16}


def test_what_cannot_be() -> None:
    model = build("bert")
    with unchanged(model), pytest.raises(ValueError, match="fits queries to keys that a conversion merged"):
        prune_heads(model, {0: [0]}, calibration=many(model), refit="descent")
    with pytest.raises(ValueError, match="descent_passes=3 has no effect on a refit of"):
        RefitOptions("full", descent_passes=3)
