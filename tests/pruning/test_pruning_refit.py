"""The refit after a pruning by its definition, its words, and the report: heads, and what the refit reached."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.refits import error, plain, seen
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import last_change, prune_heads
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.pruning.report import PruningReport

SELECTION = {0: [1, 2, 5], 2: range(8)}
# Sums of 2e4 squares in another order, in float64, and a difference of sums that are at most 1e4 times as large.
CLOSE = {"rel": 1e-8, "abs": 1e-12}


def many(model: Any, count: int = 8) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("refit", ["output", "scale"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_errors_reached_are_those_of_the_residual_stream(family: str, refit: str) -> None:
    original = build(family, num_hidden_layers=3).double()
    batches = many(original)
    pruned = prune_heads(copy.deepcopy(original), SELECTION)
    fitted = prune_heads(copy.deepcopy(original), SELECTION, calibration=iter(batches), refit=plain(refit))
    report = last_change(fitted)
    assert isinstance(report, PruningReport) and report.refit is not None and report.refit.fits == refit
    assert report.refit.num_tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    for index, layer in enumerate(report.refit.layers):
        unfitted = copy.deepcopy(fitted)
        attention_layers(unfitted)[index].output.load_state_dict(attention_layers(pruned)[index].output.state_dict())
        untouched = seen(original, index, batches)
        before = error(seen(unfitted, index, batches), untouched, stream=True)
        after = error(seen(fitted, index, batches), untouched, stream=True)
        assert layer.error_before == pytest.approx(before, **CLOSE)
        assert layer.error_after == pytest.approx(after, **CLOSE)
        assert layer.kl_before is None and layer.kl_after is None
        assert after < before or (refit == "scale" and index == 2)  # no head is left there that a factor could scale


def test_heads_before_and_after_and_the_table() -> None:
    model = build("llama", num_hidden_layers=3, kv_heads=4)
    prune_heads(model, {0: [0, 1], 1: [0, 2, 4, 6], 2: range(8)}, calibration=many(model))
    report = last_change(model)
    assert report.heads_before == ((8, 4),) * 3 and report.heads_after == ((6, 3), (4, 4), (0, 0))
    assert report.removed == {0: (0, 1), 1: (0, 2, 4, 6), 2: tuple(range(8))}
    # 8 numbers of 4 bytes for each key and value head; the layer without heads keeps a stand-in of one.
    assert (report.bytes_before, report.bytes_after) == (12 * 64, 8 * 64)
    heading, *rows = str(report).splitlines()
    assert [part.strip() for part in heading.split("  ") if part.strip()] == [
        "layer", "heads", "key/value heads", "removed", "error of outputs", "cross-validated", "ridge",
    ]  # fmt: skip
    rows, last = rows[:3], rows[3]
    assert [row.split()[:4] for row in rows] == [[str(i), "8", "->", str(n)] for i, n in enumerate((6, 4, 0))]
    assert "0,2,4,6" in rows[1] and f"{report.refit.layers[1].error_after:.3g}" in rows[1]
    assert last.startswith(
        f"24 -> 10 heads; cache 768 -> 512 bytes per token; refit output on {report.refit.num_tokens} tokens"
    )
    prune_heads(model, {1: [0]})
    again = last_change(model)
    assert again.heads_before == report.heads_after and again.refit is None and "no refit" in str(again)


def test_the_words_of_the_refit() -> None:
    model = build("bert")
    plain = prune_heads(copy.deepcopy(model), {0: [1]})
    for word in ("none", False, None):
        assert same(prune_heads(copy.deepcopy(model), {0: [1]}, refit=word), plain)
    by_default, named = (
        prune_heads(copy.deepcopy(model), {0: [1]}, calibration=many(model), **options)
        for options in ({}, {"refit": "output"})
    )
    assert same(by_default, named) and not same(named, plain)
    for word in ("full", True):
        with (
            unchanged(model),
            pytest.raises(ValueError, match=f"refit={word!r} fits queries to keys .*'output' or 'sc"),
        ):
            prune_heads(model, {0: [1]}, calibration=many(model), refit=word)
    for word in ("none", False):
        with unchanged(model), pytest.raises(ValueError, match="calibration would have no effect"):
            prune_heads(model, {0: [1]}, calibration=many(model), refit=word)
    with unchanged(model), pytest.raises(ValueError, match="refit='scale' needs calibration batches"):
        prune_heads(model, {0: [1]}, refit="scale")
    with unchanged(model), pytest.raises(ValueError, match="refit='queries' must be one of 'none', 'output', 'full'"):
        prune_heads(model, {0: [1]}, calibration=many(model), refit="queries")


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_refit_after_pruning_by_definition(family: str) -> None:
    """Every output projection solves least squares for what brings the residual stream to where the untouched model has
    it behind the attention, also where no head went."""
    original = build(family, num_hidden_layers=3).double()
    batches = [batch(original, seed=seed) for seed in range(16)]
    selection = {0: [1, 2, 5], 2: [0, 7]}
    fitted = prune_heads(copy.deepcopy(original), selection, calibration=iter(batches), refit=plain("output"))
    assert [layer.num_heads for layer in attention_layers(fitted)] == [5, 8, 6]
    for layer, old in zip(attention_layers(fitted), attention_layers(original), strict=True):
        seen: dict[str, list[Tensor]] = {"a": [], "x": [], "y": [], "x'": []}
        handles = [
            layer.output.register_forward_hook(lambda _, args, out, s=seen["a"]: s.append(args[0].detach())),
            layer.block.register_forward_hook(lambda _, args, out, s=seen["x"]: s.append(args[0].detach())),
            old.output.register_forward_hook(lambda _, args, out, s=seen["y"]: s.append(out.detach())),
            old.block.register_forward_hook(lambda _, args, out, s=seen["x'"]: s.append(args[0].detach())),
        ]
        for inputs in batches:
            fitted(**inputs)
            original(**inputs)
        for handle in handles:
            handle.remove()
        masks = [
            i.get("attention_mask", torch.ones(y.shape[:2])).bool() for i, y in zip(batches, seen["y"], strict=True)
        ]
        a, x, y, x_old = (torch.cat([t[m] for t, m in zip(seen[name], masks, strict=True)]) for name in seen)
        y = x_old + y - x
        kept = [head for head in range(8) if head not in selection.get(layer.index, [])]
        before = old.output.weight.detach().unflatten(1, (8, -1))[:, kept].flatten(1)
        if layer.output.bias is not None:
            a, y = a - a.mean(0), y - y.mean(0)
        strength = (0.1 * a.square().sum(0).mean()).sqrt()
        rows = torch.cat([a, strength * torch.eye(a.shape[1], dtype=a.dtype)])
        expected = torch.linalg.lstsq(rows, torch.cat([y, strength * before.T])).solution.T
        # Normal equations square the condition number, which the ridge keeps below 1e5 or so.
        assert (layer.output.weight - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert not torch.allclose(expected, before, rtol=1e-3)


def test_a_calibration_that_fails_leaves_every_head() -> None:
    model = build("llama")
    with unchanged(model), pytest.raises(RuntimeError):
        prune_heads(model, {0: [1]}, calibration=[batch(model), {"inputs_embeds": torch.zeros(1, 3, 5)}])
    with unchanged(model), pytest.raises(ValueError, match="refit needs calibration batches"):
        prune_heads(model, {0: [1]}, calibration=[])
