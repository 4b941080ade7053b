"""Fitting output projections: least squares by definition, and nothing changed by a batch that fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.refits import plain
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import convert_to_gqa, plan_gqa
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.layers import projected_layers


def batches_of(model: Any, count: int = 6) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("method", ["mean", "pca"])
@pytest.mark.parametrize("family", ["bert", "llama", "phi3", "vit"])
def test_refit_by_definition(family: str, method: str) -> None:
    """In the finished model, each projection solves least squares for what it now gets and what the untouched
    model's gave, with the ridge as rows of their own."""
    original = build(family).double()
    batches = batches_of(original, 12)
    statistics = collect(original, projected_layers(original), batches) if method == "pca" else None
    merged = plan_gqa(copy.deepcopy(original), 2, method=method, calibration=statistics).apply()
    options = {"method": method, "grouping": "adjacent", "refit": plain("full")}  # as with statistics
    model = convert_to_gqa(copy.deepcopy(original), 2, calibration=iter(batches), **options)
    for layer, old, before in zip(*map(projected_layers, (model, original, merged)), strict=True):
        seen: dict[str, list[Tensor]] = {"a": [], "y": []}
        layer.output.register_forward_hook(lambda _, args, out, s=seen["a"]: s.append(args[0].detach()))
        old.output.register_forward_hook(lambda _, args, out, s=seen["y"]: s.append(out.detach()))
        for inputs in batches:
            model(**inputs)
            original(**inputs)
        masks = [
            inputs.get("attention_mask", torch.ones(x.shape[:2])).bool()
            for inputs, x in zip(batches, seen["y"], strict=True)
        ]
        a, y = (torch.cat([x[m] for x, m in zip(seen[name], masks, strict=True)]) for name in "ay")
        bias = layer.output.bias
        shift_a, shift_y = (x.mean(0) if bias is not None else torch.zeros_like(x[0]) for x in (a, y))
        a, y = a - shift_a, y - shift_y
        strength = (0.1 * a.square().sum(0).mean()).sqrt()
        rows = torch.cat([a, strength * torch.eye(a.shape[1], dtype=a.dtype)])
        targets = torch.cat([y, strength * before.output.weight.detach().T])
        expected = torch.linalg.lstsq(rows, targets).solution.T
        # Normal equations square the condition number, which the ridge keeps below 1e5 or so.
        assert (layer.output.weight - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert not torch.allclose(expected, before.output.weight, rtol=1e-3)
        if bias is not None:
            assert (bias - (shift_y - expected @ shift_a)).abs().max() <= 1e-10 * bias.abs().max()


def test_a_batch_that_fails_during_the_refit_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    batches: list[Any] = [*batches_of(model), {"inputs_embeds": torch.zeros(1, 3, 5)}]
    with unchanged(model), pytest.raises(RuntimeError):
        convert_to_gqa(model, 2, calibration=batches)
    with unchanged(model), pytest.raises(ValueError, match="must be a mapping"):
        convert_to_gqa(model, 2, calibration=[*batches_of(model), (1,)])  # type: ignore[list-item]
