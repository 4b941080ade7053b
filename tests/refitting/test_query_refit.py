"""Fitting query projections: the divergence by definition, its minimum, rotations read from models, layers walked."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import EDITABLE, batch, build, outputs
from support.refits import plain
from support.unchanged import unchanged
from torch import Tensor, nn

from hf_attnkit import convert_to_gqa, plan_gqa, swap_attention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.models.layers import projected_layers
from hf_attnkit.models.rotary_pairs import Rope
from hf_attnkit.observing.attention_calls import require_shown
from hf_attnkit.observing.walk import Walk
from hf_attnkit.refitting.attention_match import Batch, curvature_along, fit_queries, mean_divergence, target
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.queries import attention_at, can_fit_queries

STEPS = RefitOptions("full").query_steps


def example(seed: int = 0, rope: Rope | None = None, causal: bool = True) -> tuple[Tensor, Batch]:
    """4 query heads of size 4 over 2 key heads, 3 sequences of 9 tokens of which the second has padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 6:] = False
    rotation = None
    if rope is not None:
        rotation = torch.polar(torch.ones(1, 9, rope.size // 2, dtype=torch.float64), normal(1, 9, rope.size // 2))
    mask = Mask.aligned(9, 9, is_causal=causal, key_visible=real)
    made = Batch(
        normal(3, 9, 7), normal(3, 2, 9, 4), normal(3, 4, 9, 4), normal(3, 4, 9, 4), mask, 0.5, real, rope, rotation
    )
    return normal(4, 4, 7), made


def gradient_of(weight: Tensor, made: Batch) -> tuple[Tensor, Tensor]:
    found, unseen, gradient = mean_divergence(
        [made.query(weight)], [made], [target(made, torch.Generator().manual_seed(0))]
    )
    assert unseen is None
    return found, gradient


def divergence(weight: Tensor, made: Batch) -> Tensor:
    """Written out: per head, query by query."""
    query = torch.einsum("hdm,btm->bhtd", weight, made.inputs)
    if made.rope is not None:
        rotated = query.clone()
        for pair, (a, b) in enumerate(zip(*made.rope.pairs(), strict=True)):
            cos, sin = made.rotation.real[:, None, :, pair], made.rotation.imag[:, None, :, pair]  # type: ignore[union-attr]
            rotated[..., a] = cos * query[..., a] - sin * query[..., b]
            rotated[..., b] = sin * query[..., a] + cos * query[..., b]
        query = rotated
    total = []
    for head in range(4):
        found = []
        for row in range(3):
            for i in range(9):
                if not made.counts[row, i]:
                    continue
                seen = [j for j in range(9) if made.counts[row, j] and (j <= i or not made.mask.is_causal)]
                target = (made.target_key[row, head, seen] @ made.target_query[row, head, i] * 0.5).log_softmax(0)
                own = (made.key[row, head // 2, seen] @ query[row, head, i] * 0.5).log_softmax(0)
                found.append((target.exp() * (target - own)).sum())
        total.append(torch.stack(found).mean())
    return torch.stack(total)


@pytest.mark.parametrize("rope", [None, Rope("half", 4), Rope("interleaved", 2)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_divergence_gradient_and_curvature_by_definition(
    rope: Rope | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of two queries, so that they have to be put together.
    monkeypatch.setattr("hf_attnkit.refitting.attention_match.BLOCK", 2 * 3 * 4 * 9)
    weight, made = example(rope=rope, causal=causal)
    weight.requires_grad_()
    expected = divergence(weight, made)
    (slope,) = torch.autograd.grad(expected.sum(), weight)
    with torch.no_grad():
        found, gradient = gradient_of(weight, made)
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        curvature = curvature_along([made.query(weight)], [made.query(direction)], [made])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for head in range(4):
        first = torch.autograd.grad(divergence(weight + step * direction, made)[head], step, create_graph=True)[0]
        second = torch.autograd.grad(first, step)[0]
        torch.testing.assert_close(curvature[head], second, rtol=1e-10, atol=1e-12)


def test_many_steps_reach_the_minimum_and_few_never_worsen() -> None:
    weight, made = example(rope=Rope("half", 4))
    with torch.no_grad():
        best, before, after = fit_queries(weight, [made], steps=300)
        # Convex, so that no slope means the minimum. 24 tokens for 28 numbers a head: some directions are
        # nearly flat, and 300 steps bring the slope down by five orders.
        assert gradient_of(best, made)[1].norm() <= 1e-5 * gradient_of(weight, made)[1].norm()
        for steps in (0, 1, 2, 5):
            fitted, first, least = fit_queries(weight, [made], steps=steps)
            assert torch.equal(first, before) and bool((least <= first).all()) and bool((least >= after - 1e-9).all())
            torch.testing.assert_close(gradient_of(fitted, made)[0], least, rtol=1e-12, atol=0)
        torch.testing.assert_close(before, divergence(weight, made), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after, divergence(best, made), rtol=1e-12, atol=1e-12)


def test_each_head_takes_the_step_that_is_best_where_it_was_not_fitted() -> None:
    """Against fits of fewer steps to the first sequences alone, measured on the last."""
    weight, made = example()
    last = torch.zeros(3, 9, dtype=torch.bool)
    last[2] = True
    split = replace(made, counts=made.counts & ~last, unseen=last.double())
    fitted_to, others = replace(split, unseen=None), replace(made, counts=last)
    with torch.no_grad():
        found, before, after = fit_queries(weight, [split], steps=40)
        tried = [fit_queries(weight, [fitted_to], steps=steps)[0] for steps in range(41)]
        measured = torch.stack([gradient_of(each, others)[0] for each in tried])
        torch.testing.assert_close(before, measured[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(after, measured.min(0).values, rtol=1e-8, atol=0)
        torch.testing.assert_close(gradient_of(found, others)[0], after, rtol=1e-8, atol=0)
    assert bool((measured[-1] > after * 1.01).any()), "the last step was best, so nothing was tested"


def test_queries_that_fit_already_stay() -> None:
    weight, made = example()
    query = torch.einsum("hdm,btm->bhtd", weight, made.inputs)
    exact = Batch(made.inputs, made.key, query, made.key, made.mask, made.scaling, made.counts)
    with torch.no_grad():
        fitted, before, _ = fit_queries(weight, [exact], STEPS)
    # Rounding of log-sum-exps over 9 scores of some 10.
    assert float(before.abs().max()) < 1e-13 and float((fitted - weight).abs().max()) < 1e-6


# The norms of Qwen 3's queries leave nothing to fit;
# RoBERTa and ELECTRA attend as BERT does, Mistral and Qwen 2 as Llama.
LEFT_OUT = ("qwen3", "roberta", "electra", "mistral", "qwen2")


@pytest.mark.parametrize("family", [family for family in EDITABLE if family not in LEFT_OUT])
def test_refit_brings_every_layer_nearer_to_the_untouched_attention(family: str) -> None:
    original = build(family).double()
    batches = [batch(original, seed=seed) for seed in range(12)]
    fitted = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=plain("full"))
    merged = plan_gqa(copy.deepcopy(original), 2).apply()
    # Layer 0 gets the same input in all three, so there the definition can be held against the models themselves.
    layers = [projected_layers(model)[0] for model in (original, merged, fitted)]
    assert all(map(can_fit_queries, layers))
    totals = []
    for model, layer in zip((original, merged, fitted), layers, strict=True):
        found = []
        with attention_at(model, layer, require_shown(model)) as run:
            for inputs in batches:
                call = run(Walk(model, inputs))
                key = call.key.repeat_interleave(layer.group_size, dim=1)
                scores = call.query @ key.mT * call.scaling
                visible = call.mask.visible()
                if visible is not None:
                    scores = scores.masked_fill(~visible, -1e300)
                real = inputs.get("attention_mask", torch.ones(scores.shape[0], scores.shape[2])).bool()
                found.append(scores.log_softmax(-1).transpose(1, 2)[real])
        totals.append(found)
    before, after = (
        sum(float((t.exp() * (t - o).clamp(-1e200, 1e200)).sum()) for t, o in zip(totals[0], other, strict=True))
        for other in totals[1:]
    )
    assert after < 0.8 * before


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_heads_that_were_regrouped_are_fitted_to_themselves(family: str) -> None:
    """Heads that merge exactly when grouped right: nothing is left to fit, so outputs stay as they were."""
    model = build(family, **({"kv_heads": 4} if family == "llama" else {})).double()
    with torch.no_grad():
        for layer in projected_layers(model):
            for name in ("key", "value"):
                for p in getattr(layer, name).parameters():
                    halves = p.unflatten(0, (2, -1))
                    halves[1] = halves[0]
    inputs = batch(model)
    before = outputs(model, inputs)
    number = projected_layers(model)[0].num_key_value_heads // 2
    batches = [batch(model, seed=seed) for seed in range(12)]
    groups = plan_gqa(model, number, grouping="best").layers[0].groups
    assert groups != tuple((i, i + 1) for i in range(0, 2 * number, 2)), "adjacent, so nothing was tested"
    convert_to_gqa(model, number, method="mean", grouping="best", calibration=batches)
    # The refit's solves, whose condition the ridge keeps below 1e5 or so, and divergences of rounding alone.
    assert (outputs(model, inputs) - before).abs().max() <= 1e-8 * before.abs().max()


def test_a_layer_whose_queries_are_normed_or_linear_keeps_them() -> None:
    model = build("qwen3")
    batches = [batch(model, seed=seed) for seed in range(4)]
    queries = [layer.query.weight for layer in projected_layers(model)]
    convert_to_gqa(model, 2, method="mean", calibration=batches)
    assert all(torch.equal(a.query.weight, b) for a, b in zip(projected_layers(model), queries, strict=True))
    with pytest.warns(UserWarning, match="linear"):
        model = swap_attention(build("llama"), {1: "linear"})
    queries = [layer.query.weight.clone() for layer in projected_layers(model)]
    convert_to_gqa(model, 2, method="mean", calibration=batches, refit=plain("full"))
    same = [torch.equal(a.query.weight, b) for a, b in zip(projected_layers(model), queries, strict=True)]
    assert same == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("bert", torch.float16), ("llama", torch.float16), ("llama", torch.bfloat16), ("glm", torch.bfloat16),
     ("phi3", torch.float16)],
    ids=str,
)  # fmt: skip
def test_models_in_16_bits_are_fitted_in_float32(family: str, dtype: torch.dtype) -> None:
    """The weights are those of the same model in float32, rounded, up to what its activations' rounding moves."""
    model = build(family).to(dtype)
    batches = [batch(model, seed=seed) for seed in range(12)]
    wide = convert_to_gqa(copy.deepcopy(model).float(), 2, method="mean", calibration=batches, refit=plain("full"))
    fitted = convert_to_gqa(model, 2, method="mean", calibration=batches, refit=plain("full"))
    for a, b in zip(projected_layers(fitted)[:1], projected_layers(wide)[:1], strict=True):
        assert a.query.weight.dtype == dtype
        assert (a.query.weight.float() - b.query.weight).norm() < 0.1 * b.query.weight.norm()


def test_queries_stay_where_something_unknown_is_between_projection_and_scores() -> None:
    model = build("bert")
    batches = [batch(model, seed=seed) for seed in range(4)]
    query = projected_layers(model)[1].query
    query.register_forward_hook(lambda module, args, output: output.tanh())
    before = query.weight.detach().clone()
    plan = plan_gqa(model, 2, method="mean", calibration=batches)
    plan.apply()
    assert plan.report is not None and plan.report.refit is not None
    first, second = plan.report.refit.layers
    assert first.kl_after is not None and second.kl_after is None and torch.equal(query.weight, before)


def test_a_walk_sees_what_a_forward_pass_shows_and_runs_each_layer_once() -> None:
    model = build("llama", num_hidden_layers=5)
    inputs = batch(model)
    expected: dict[int, tuple[Tensor, Tensor]] = {}
    runs = [0] * 5
    layers = projected_layers(model)

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            expected[index] = args[0], output

        return hook

    handles = [layer.output.register_forward_hook(note(layer.index)) for layer in layers]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.query.register_forward_hook(
            lambda *_, index=layer.index: runs.__setitem__(index, runs[index] + 1)  # type: ignore[misc]
        )
    walk = Walk(model, inputs)
    with unchanged(model):
        for layer in layers:
            for _ in range(2):
                for a, b in zip(walk.seen(layer.index, layer.output)[:2], expected[layer.index], strict=True):
                    assert torch.equal(a, b)
    assert runs == [3, 3, 3, 3, 2], "two looks, and once on the way to the next layer"
    with pytest.raises(ValueError, match=r"layer 2 .* was asked for after block 4"):
        walk.seen(2, layers[2].output)
