"""What a conversion reports is what the models themselves show: losses reached, divergences, heads, bytes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.refits import error, plain, seen
from torch import Tensor

import hf_attnkit
from hf_attnkit import convert_to_gqa, last_change, load_pretrained, plan_gqa, prune_heads
from hf_attnkit.conversion import ConversionReport
from hf_attnkit.models.layers import projected_layers

# Sums of 2e4 squares in another order, in float64, and a difference of sums that are at most 1e4 times as large.
CLOSE = {"rel": 1e-8, "abs": 1e-12}


def many(model: Any, count: int = 8) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


def with_module(model: Any, index: int, name: str, of: Any) -> Any:
    """A copy of the model with one projection of another one."""
    changed = copy.deepcopy(model)
    getattr(projected_layers(changed)[index], name).load_state_dict(
        getattr(projected_layers(of)[index], name).state_dict()
    )
    return changed


def attention(model: Any, index: int, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Attention weights of a layer's real queries, `(tokens, heads, keys)` for each batch."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    found = []
    for inputs in batches:
        weights = eager(**inputs, output_attentions=True).attentions[index]
        found.append(weights.double().transpose(1, 2)[inputs["attention_mask"].bool()])
    return found


def divergence(model: Any, original: Any, index: int, batches: list[dict[str, Tensor]]) -> float:
    total, count = 0.0, 0
    for p, q in zip(attention(original, index, batches), attention(model, index, batches), strict=True):
        total += float((p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log()).sum() / p.shape[1])
        count += len(p)
    return total / count


@pytest.mark.parametrize(
    ("family", "refit"),
    [("bert", "output"), ("bert", "full"), ("llama", "scale"), ("llama", "full"), ("phi3", "output")],
)
def test_errors_reached_are_those_of_the_models(family: str, refit: str) -> None:
    original = build(family).double()
    batches = many(original)
    merged = convert_to_gqa(copy.deepcopy(original), 2, method="pca", calibration=batches, refit="none")
    fitted = convert_to_gqa(copy.deepcopy(original), 2, method="pca", calibration=batches, refit=plain(refit))
    report = last_change(fitted)
    assert isinstance(report, ConversionReport) and report.refit is not None
    assert report.refit.num_tokens == report.num_tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    for index, layer in enumerate(report.refit.layers):
        untouched = seen(original, index, batches)
        before = error(seen(with_module(fitted, index, "output", merged), index, batches), untouched, stream=False)
        after = error(seen(fitted, index, batches), untouched, stream=False)
        assert layer.index == index and after < before
        assert layer.error_before == pytest.approx(before, **CLOSE)
        assert layer.error_after == pytest.approx(after, **CLOSE)
        assert (layer.kl_before is None) == (layer.kl_after is None) == (refit != "full")


def test_divergences_are_those_of_the_attention_weights() -> None:
    original = build("llama").double()
    # Without padding, whose rows eager attention in float64 makes NaN.
    batches = [batch(original, (13, 13, 13), seed=seed) for seed in range(8)]
    options = {"method": "pca", "grouping": "adjacent", "calibration": batches}  # heads stay where they are
    merged = convert_to_gqa(copy.deepcopy(original), 2, **options, refit="none")
    fitted = convert_to_gqa(copy.deepcopy(original), 2, **options, refit=plain("full"))
    for layer in last_change(fitted).refit.layers:
        before = divergence(with_module(fitted, layer.index, "query", merged), original, layer.index, batches)
        after = divergence(fitted, original, layer.index, batches)
        assert after < before
        # Transformers takes the softmax in float32, whose probabilities are off by a few units of 6e-8.
        assert layer.kl_before == pytest.approx(before, rel=1e-4) and layer.kl_after == pytest.approx(after, rel=1e-4)


def test_factors_for_heads_are_the_least_squares_solution() -> None:
    """refit="scale" after a conversion: towards what the untouched attention put out, with the ridge as rows."""
    original = build("bert").double()
    batches = many(original)
    merged = convert_to_gqa(copy.deepcopy(original), 2)
    fitted = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=plain("scale"))
    for index, (layer, before) in enumerate(zip(*map(projected_layers, (fitted, merged)), strict=True)):
        gets: list[Tensor] = []
        handle = layer.output.register_forward_pre_hook(lambda _, args, gets=gets: gets.append(args[0].detach()))
        for inputs in batches:
            fitted(**inputs)
        handle.remove()
        a = torch.cat([x[i["attention_mask"].bool()] for x, i in zip(gets, batches, strict=True)])
        y = seen(original, index, batches)["y"] - before.output.bias
        parts = torch.einsum("thd,mhd->tmh", a.unflatten(1, (8, -1)), before.output.weight.unflatten(1, (8, -1)))
        rows = parts.flatten(0, 1)
        strength = (0.1 * rows.square().sum(0).mean()).sqrt()
        solution = torch.linalg.lstsq(
            torch.cat([rows, strength * torch.eye(8, dtype=rows.dtype)]),
            torch.cat([y.flatten(), strength.expand(8)])[:, None],
        ).solution
        expected = (before.output.weight.unflatten(1, (8, -1)) * solution.view(8, 1)).flatten(1)
        assert (layer.output.weight - expected).abs().max() <= 1e-9 * expected.abs().max()
        assert torch.equal(layer.output.bias, before.output.bias)
        assert not torch.allclose(layer.output.weight, before.output.weight, rtol=1e-3)


def test_the_report_of_a_layer_whose_queries_stay_names_no_divergence() -> None:
    model = convert_to_gqa(build("qwen3"), 2, calibration=many(build("qwen3")))
    report = last_change(model)
    assert report.refit.fits == "full" and all(layer.kl_before is None for layer in report.refit.layers)
    assert "KL" not in str(report) and "error of outputs" in str(report)


def test_it_prints_as_a_table() -> None:
    model = build("llama")
    plan = plan_gqa(model, [2, 4], method="pca", calibration=many(model), refit="full")
    assert "refit: full" in str(plan).splitlines()[-1] and "KL" not in str(plan)
    plan.apply()
    heading, *rows = str(plan.report).splitlines()
    rows, last, held = rows[:2], rows[2], rows[3]
    assert "KL of attention (nats)" in heading and "error of outputs" in heading
    assert "8 -> 2" in rows[0] and "8 -> 4" in rows[1]
    for row, layer in zip(rows, plan.report.refit.layers, strict=True):
        assert f"{layer.kl_before:.3g} -> {layer.kl_after:.3g}" in row
        assert f"{layer.error_before:.3g} -> {layer.error_after:.3g}" in row
    for part in ("method pca", "240 calibration tokens", "1,024 -> 384 bytes", "refit full on "):
        assert part in last, part
    told = plan.report.refit.held_out
    assert held.startswith(f"sequences held out: {told.num_sequences}; distance of outputs: ") and held.endswith(
        f"kept: {told.kept}"
    )
    assert all(f"{name} {error:.3g}" in held for name, error in told.errors.items())
    assert set(told.errors) == {"none", "full", "queries"} and told.kept in told.errors
    assert plan.report.heads_before == ((8, 8), (8, 8)) and plan.report.heads_after == ((8, 2), (8, 4))
    assert (plan.report.bytes_before, plan.report.bytes_after) == (1024, 384)
    assert "no refit" in str(last_change(convert_to_gqa(build("llama"), 2)))


def test_the_last_change_is_told_and_is_neither_saved_nor_copied(tmp_path: Path) -> None:
    model = build("bert")
    assert hf_attnkit.last_change(model) is None
    convert_to_gqa(model, 4)
    first = last_change(model)
    convert_to_gqa(model, 2)
    assert last_change(model) is not first and last_change(model).heads_before == ((8, 4), (8, 4))
    prune_heads(model, {0: [0, 1, 2, 3]})
    assert type(last_change(model)).__name__ == "PruningReport"
    with pytest.raises(ValueError, match="not possible"):
        convert_to_gqa(model, 3)
    assert type(last_change(model)).__name__ == "PruningReport", "a change that failed is no change"
    assert last_change(copy.deepcopy(model)) is None and last_change(model) is not None
    model.save_pretrained(tmp_path)
    assert last_change(load_pretrained(tmp_path)) is None
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = pickle.loads(pickle.dumps(model))
    assert last_change(again) is None and not any("last" in name for name in vars(model))
    assert pickle.loads(pickle.dumps(first)) == first
