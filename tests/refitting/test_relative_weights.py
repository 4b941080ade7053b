"""Tokens that count by the inverse square of their residual stream: what a decoder's refit does by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.any_model import any_model
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor

from hf_attnkit import RefitOptions, convert_to_gqa, last_change, plan_gqa, prune_heads, swap_attention
from hf_attnkit.refitting.token_weights import FLOOR, floor_of, relative_weights

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
        squares = old.square().mean(-1)
        least = floor_of([old], [torch.ones(len(old), dtype=torch.bool)])
        assert least == pytest.approx(FLOOR * float(squares.median()), rel=1e-6)
        weights = relative_weights(unfitted, old, least).double()
        by_hand = 2 / (unfitted.square().mean(-1) + squares)
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
    relative = RefitOptions("output", token_weights="relative")
    for change in (convert_to_gqa, plan_gqa):
        with (
            unchanged(model),
            pytest.raises(ValueError, match="token_weights='relative' counts tokens by the residual"),
        ):
            change(model, 2, calibration=batches, refit=relative)
    convert_to_gqa(model, 2, calibration=batches, refit="output")
    assert last_change(model).refit.token_weights == "uniform"  # type: ignore[union-attr]


def test_where_the_stream_cannot_be_told_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A norm of Gemma 2 comes before the attention's output is added."""
    model = any_model("gemma2")
    batches = [{"input_ids": torch.arange(3, 13).view(2, 5) + seed} for seed in range(4)]
    counted = {}
    for words in (None, "relative"):
        options = RefitOptions("output", token_weights=words)
        changed = prune_heads(copy.deepcopy(model), {0: [0, 1]}, calibration=batches, refit=options)
        counted[words] = caplog.text.count("all tokens count alike in the refit of")
        assert last_change(changed).refit.token_weights == "uniform"  # type: ignore[union-attr]
    assert counted == {None: 0, "relative": 1}


def test_tokens_without_a_stream_do_not_decide_the_fit() -> None:
    """Padding that no mask tells has none at all; a norm's eps reads the errors of others that are next to nothing."""
    model = build("llama", "causal", 8, 4).double()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.0
        model.model.embed_tokens.weight[1] *= 1e-5
    batches = [{"input_ids": batch(model, seed=seed)["input_ids"].clamp(min=2)} for seed in range(8)]
    small = [{"input_ids": inputs["input_ids"].clone()} for inputs in batches]
    for number, inputs in enumerate(small):
        inputs["input_ids"][:, :2] = number % 2
    for data in (batches, small):
        prune_heads(copy.deepcopy(model), HEADS, calibration=data, refit=plainly(None))
    before = torch.cat([torch.ones(9, 3), torch.zeros(1, 3), torch.full((1, 3), 1e-5)])
    least = floor_of([before], [torch.ones(11, dtype=torch.bool)])
    weights = relative_weights(before, before, least)
    assert torch.equal(weights[:9], torch.ones(9))
    torch.testing.assert_close(weights[9:], torch.full((2,), 1 / FLOOR))


def test_a_model_without_any_stream_counts_all_tokens_alike() -> None:
    assert floor_of([torch.zeros(2, 3)], [torch.ones(2, dtype=torch.bool)]) == 0.0
    assert floor_of([torch.ones(2, 3)], [torch.zeros(2, dtype=torch.bool)]) == 0.0
