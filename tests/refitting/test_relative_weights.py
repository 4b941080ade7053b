"""Tokens that count by the inverse square of their residual stream: what a decoder's refit does by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import RefitOptions, convert_to_gqa, last_change, prune_heads, swap_attention
from hf_attnkit.refitting.token_weights import relative_weights

HEADS = {0: [0, 1], 1: [4, 5]}


def plainly(words: str | None) -> RefitOptions:
    return RefitOptions("output", ridge=0.1, token_weights=words, held_out=0.0, beginnings=0)


def seen_in(model: Any, batches: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each Llama layer and all real tokens: what the output projection takes and puts out, and the stream then."""
    found: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = [([], [], []) for _ in model.model.layers]
    handles = []
    for (taken, output, stream), layer in zip(found, model.model.layers, strict=True):

        def look(_: Any, args: Any, out: Tensor, taken: list[Tensor] = taken, output: list[Tensor] = output) -> None:
            taken.append(args[0].detach())
            output.append(out.detach())

        def after(_: Any, args: Any, stream: list[Tensor] = stream) -> None:
            stream.append(args[0].detach())

        handles += [
            layer.self_attn.o_proj.register_forward_hook(look),
            layer.post_attention_layernorm.register_forward_pre_hook(after),
        ]
    real = [inputs["attention_mask"].bool() for inputs in batches]
    with torch.no_grad():
        for inputs in batches:
            model(**inputs)
    for handle in handles:
        handle.remove()
    return [tuple(torch.cat([x[m] for x, m in zip(part, real, strict=True)]) for part in each) for each in found]  # type: ignore[misc]


def test_least_squares_by_definition() -> None:
    """In the finished model, with the ridge as rows of their own."""
    original = build("llama", "causal", 8, 4).double()
    batches = [batch(original, seed=seed) for seed in range(12)]
    cut = prune_heads(copy.deepcopy(original), HEADS)
    model = prune_heads(copy.deepcopy(original), HEADS, calibration=batches, refit=plainly(None))
    now, before = seen_in(model, batches), seen_in(original, batches)
    for index, ((a, y, s), (_, _, old)) in enumerate(zip(now, before, strict=True)):
        uncut, projection = (each.model.layers[index].self_attn.o_proj for each in (cut, model))
        old_weight, wanted = uncut.weight.detach(), old - (s - y)
        unfitted = s - y + a @ old_weight.T + uncut.bias.detach()
        weights = relative_weights(unfitted, old).double()
        by_hand = 2 / (unfitted.square().mean(-1) + old.square().mean(-1))
        torch.testing.assert_close(weights, by_hand, rtol=1e-6, atol=0.0)
        mean_a, mean_y = ((weights[:, None] * x).sum(0) / weights.sum() for x in (a, wanted))
        root = weights.sqrt()[:, None]
        centred_a, centred_y = root * (a - mean_a), root * (wanted - mean_y)
        strength = (0.1 * centred_a.square().sum(0).mean()).sqrt()
        rows = torch.cat([centred_a, strength * torch.eye(a.shape[1], dtype=a.dtype)])
        expected = torch.linalg.lstsq(rows, torch.cat([centred_y, strength * old_weight.T])).solution.T
        fitted = projection.weight
        # Weights are of float32 (2^-24 each); no other step is, and the ridge keeps the condition below 1e5.
        assert (fitted - expected).abs().max() <= 1e-6 * expected.abs().max()
        bias = mean_y - expected @ mean_a
        assert (projection.bias - bias).abs().max() <= 1e-6 * bias.abs().max()
        assert not torch.allclose(fitted, old_weight, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "words", "counted"),
    [
        ("llama", None, "relative"),
        ("llama", "uniform", "uniform"),
        ("bert", None, "uniform"),
        ("bert", "relative", "relative"),
    ],
)
def test_which_tokens_count_how(family: str, words: str | None, counted: str) -> None:
    model = build(family, "sequence", 8, 4) if family == "llama" else build(family, "sequence")
    batches = [batch(model, seed=seed) for seed in range(4)]
    options = RefitOptions("output", token_weights=words)
    for change in (
        lambda copied: prune_heads(copied, {0: [0, 1]}, calibration=batches, refit=options),
        lambda copied: swap_attention(copied, "sliding_window", window=3, calibration=batches, refit=options),
    ):
        report = last_change(change(copy.deepcopy(model))).refit  # type: ignore[union-attr]
        assert report is not None and report.token_weights == counted
        assert all(layer.share is None for layer in report.layers)


def test_a_conversion_has_no_stream_to_count_by() -> None:
    model = build("llama", "causal", 8, 4)
    batches = [batch(model, seed=seed) for seed in range(4)]
    with unchanged(model), pytest.raises(ValueError, match="token_weights='relative' is of the residual stream"):
        convert_to_gqa(model, 2, calibration=batches, refit=RefitOptions("output", token_weights="relative"))
    convert_to_gqa(model, 2, calibration=batches, refit="output")
    assert last_change(model).refit.token_weights == "uniform"  # type: ignore[union-attr]


def test_an_empty_stream_counts_without_dividing_by_zero() -> None:
    found = relative_weights(torch.zeros(2, 3), torch.zeros(2, 3))
    assert bool(found.isfinite().all())
