"""The conversion methods against their definitions: exactness, optimality, predicted losses, refit."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import CLASSES, EDITABLE, SAMPLES, batch, build, outputs
from support.unchanged import unchanged
from torch import Tensor
from transformers import DynamicCache

from hf_attnkit import cache_bytes_per_token, convert_to_gqa, load_pretrained, plan_gqa
from hf_attnkit.conversion import METHODS, Statistics
from hf_attnkit.conversion import predicted_loss as loss
from hf_attnkit.conversion.heads import Heads, read
from hf_attnkit.conversion.methods import pca
from hf_attnkit.conversion.methods.table import group_loss, merge, merge_keys, merge_values, transforms
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.layers import projected_layers
from hf_attnkit.models.rotary_pairs import Rope

NORMED = ("qwen3",)
ROPES = [None, Rope("half", 8), Rope("interleaved", 8), Rope("half", 4), Rope("interleaved", 4)]


def many(model: Any, count: int = 6) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


def random_heads(
    seed: int, kv_heads: int = 3, queries: int = 2, rope: Rope | None = None, output_bias: bool = False
) -> tuple[Heads, Tensor]:
    """Heads of size 8 over 12 inputs, and 64 inputs with a 1 appended whose components are correlated."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(64, 12) @ normal(12, 12) + normal(12)
    inputs = torch.cat([inputs, torch.ones(64, 1, dtype=torch.float64)], dim=1)
    heads = Heads(
        normal(kv_heads, queries, 8, 13), normal(kv_heads, 8, 13), normal(kv_heads, 8, 13),
        normal(kv_heads, queries, 10, 8), rope, output_bias=output_bias,
    )  # fmt: skip
    return heads, inputs


def moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("family", EDITABLE)
@pytest.mark.parametrize("calibrated", [False, True], ids=["identity", "calibrated"])
def test_as_many_heads_as_before_change_nothing(family: str, calibrated: bool) -> None:
    """The certificate: the changes of basis alone, folded into the neighbours, leave the outputs as they are."""
    model = build(family, kv_heads=4 if SAMPLES[family].grouped else None).double()
    before = outputs(model, batch(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    present = projected_layers(model)[0].num_key_value_heads
    options = {"key_method": "mean"} if family in NORMED else {}
    calibration = many(model) if calibrated else None
    convert_to_gqa(model, present, method="pca", calibration=calibration, refit=False, **options)
    # Rounding of eps64 is multiplied by the condition of the maps, whose roots are cut off at 1e-10;
    # at these random weights that is some 1e3 for each of two layers.
    assert (outputs(model, batch(model)) - before).abs().max() <= 1e-9 * before.abs().max()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    assert len(changed) >= 4, "the bases did not change, so nothing was tested"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rope", [None, ROPES[3]], ids=["plain", "partly rotated"])
def test_queries_and_outputs_change_exactly_if_the_method_says_so(method: str, rope: Rope | None) -> None:
    heads, x = random_heads(0, rope=rope)
    query, _ = merge_keys(heads, moment(x), method)
    _, output, constant = merge_values(heads, moment(x), method)
    changed = not torch.equal(query, heads.query), not torch.equal(output, heads.output)
    assert changed == 2 * (transforms(method),) and constant is None


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("method", ["procrustes", "pca"])
def test_rotated_copies_of_a_head_merge_exactly(method: str, rope: Rope | None) -> None:
    """Key heads that differ by an angle for each rotated pair and a rotation of the rest, values by any rotation."""
    heads, x = random_heads(2, rope=rope)
    generator = torch.Generator().manual_seed(1)
    keys, values = [], []
    for _ in range(3):
        turn = torch.eye(8, dtype=torch.float64)
        size = rope.size if rope else 0
        rest = torch.linalg.qr(torch.randn(8 - size, 8 - size, generator=generator, dtype=torch.float64))[0]
        turn[size:, size:] = rest
        for a, b in zip(*rope.pairs(), strict=True) if rope else ():
            angle = 6.28 * torch.rand((), generator=generator, dtype=torch.float64)
            turn[a, a], turn[a, b], turn[b, a], turn[b, b] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
        keys.append(turn @ heads.key[0])
        other = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
        values.append(other @ heads.value[0])
    heads = replace(heads, key=torch.stack(keys), value=torch.stack(values))
    merged = merge(heads, [[0, 1, 2]], moment(x), method, method)
    assert merged.key_loss < 1e-12 and merged.value_loss < 1e-12
    mean = merge(heads, [[0, 1, 2]], moment(x), "mean", "mean")
    assert mean.key_loss > 0.1 and mean.value_loss > 0.1


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_predicted_loss_is_the_mean_over_tokens(method: str, rope: Rope | None, output_bias: bool) -> None:
    """Values: over all tokens. Keys: over all pairs of tokens, rotated pairs also over all angles."""
    heads, x = random_heads(1, rope=rope, output_bias=output_bias)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    merged = merge(heads, [[0, 1, 2]], moment(x), method, method)
    torch.set_rng_state(state)
    new = merged.heads

    def values(h: Heads, group: int) -> Tensor:
        return torch.einsum("gqme,gef,tf->gqtm", h.output, h.value.expand(group, -1, -1), x)

    stacked = Heads(new.query.view(3, 2, 8, 13), new.key.expand(3, -1, -1), new.value.expand(3, -1, -1),
                    new.output.view(3, 2, 10, 8))  # fmt: skip
    difference, whole = values(heads, 3) - values(stacked, 3), values(heads, 3)
    if output_bias:  # constants pass into the bias
        difference, whole = (v - v.mean(2, keepdim=True) for v in (difference, whole))
    expected = difference.square().sum() / whole.square().sum()
    assert abs(merged.value_loss - expected) <= 1e-10 * max(1, expected)

    def energy(old: Heads, other: Heads | None) -> Tensor:
        """Of the scores' difference, for each of 8 angles between query and key."""
        total = torch.zeros((), dtype=torch.float64)
        size = rope.size if rope else 0
        plain = slice(size, None)

        def projections(h: Heads) -> tuple[Tensor, Tensor]:
            return torch.einsum("gqem,tm->gqte", h.query, x), torch.einsum("gem,tm->gte", h.key, x)

        parts = [projections(h) for h in (old, other) if h is not None]

        def score(q: Tensor, k: Tensor) -> Tensor:
            k = k[..., plain] - k[..., plain].mean(-2, keepdim=True)  # constants cancel in the softmax
            return torch.einsum("gqte,gse->gqts", q[..., plain], k)

        scores = [score(*part) for part in parts]
        total += (scores[0] - (scores[1] if other else 0)).square().mean((-1, -2)).sum()
        for a, b in zip(*rope.pairs(), strict=True) if rope else ():
            for angle in torch.arange(8, dtype=torch.float64) * torch.pi / 4:
                cos, sin = angle.cos(), angle.sin()
                found = []
                for q, k in parts:
                    turned = torch.stack([cos * k[..., a] - sin * k[..., b], sin * k[..., a] + cos * k[..., b]], -1)
                    found.append(torch.einsum("gqte,gse->gqts", torch.stack([q[..., a], q[..., b]], -1), turned))
                total += (found[0] - (found[1] if other else 0)).square().mean((-1, -2)).sum() / 8
        return total

    expected = energy(heads, stacked) / energy(heads, None)
    assert abs(merged.key_loss - expected) <= 1e-10 * max(1, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rope=st.sampled_from(ROPES), output_bias=st.booleans(), queries=st.integers(1, 3))
def test_pca_loses_least(seed: int, rope: Rope | None, output_bias: bool, queries: int) -> None:
    """Less than every other method, and than itself with another shared head."""
    heads, x = random_heads(seed, queries=queries, rope=rope, output_bias=output_bias)
    losses = {name: merge(heads, [[0, 1, 2]], moment(x), name, name) for name in METHODS}
    best = losses.pop("pca")
    for name, other in losses.items():
        if rope is None or name != "pca":
            assert best.value_loss <= other.value_loss + 1e-9, name
        assert best.key_loss <= other.key_loss + 1e-9, name
    assert best.value_loss < 1 and best.key_loss < 1


@pytest.mark.parametrize("output_bias", [False, True])
def test_pca_loses_the_discarded_share_of_the_spectrum(output_bias: bool) -> None:
    """One query head each: the singular values of the output-weighted, whitened stack (Eckart and Young)."""
    heads, x = random_heads(3, queries=1, output_bias=output_bias)
    if output_bias:
        x = x - x.mean(0)
    stack = torch.cat([heads.output[h, 0] @ heads.value[h] @ x.T for h in range(3)])
    values = torch.linalg.svdvals(stack).square()
    merged = merge(heads, [[0, 1, 2]], moment(random_heads(3, queries=1)[1]), "pca", "pca")
    assert abs(merged.value_loss - values[8:].sum() / values.sum()) <= 1e-10


def test_statistics_are_the_mean_over_tokens_without_padding(tmp_path: Path) -> None:
    model = build("llama")
    batches, seen = many(model, 2), []
    layers = projected_layers(model)
    for layer in layers:
        rows: list[Tensor] = []
        handle = layer.query.register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].detach().double())
        )
        for inputs in batches:
            model(**inputs)
        handle.remove()
        tokens = torch.cat([x[inputs["attention_mask"].bool()] for x, inputs in zip(rows, batches, strict=True)])
        seen.append(torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1))
    with unchanged(model):
        statistics = collect(model, layers, batches)
    assert statistics.num_tokens == len(seen[0]) == 60
    for found, tokens in zip(statistics.second_moments, seen, strict=True):
        # Products of 60 float32 terms, in two parts.
        bound = 60 * torch.finfo(torch.float32).eps * tokens.square().max()
        assert (found - moment(tokens)).abs().max() <= bound
    statistics.save(tmp_path / "moments.safetensors")
    again = Statistics.load(tmp_path / "moments.safetensors")
    assert again.num_tokens == 60
    for a, b in zip(again.second_moments, statistics.second_moments, strict=True):
        assert torch.equal(a, b.float().double())


def test_statistics_that_are_not_finite_or_of_another_model_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    statistics = collect(model, projected_layers(model), many(model))
    statistics.second_moments[1][0, 0] = torch.nan
    statistics.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="layer 1: the calibration statistics contain NaN"):
        Statistics.load(tmp_path / "nan.safetensors")
    with unchanged(model), pytest.raises(ValueError, match="layer 1: the calibration statistics contain NaN"):
        convert_to_gqa(model, 4, method="pca", calibration=statistics)
    bert = build("bert")
    other = collect(bert, projected_layers(bert), many(bert))
    other.second_moments.pop()
    with unchanged(model), pytest.raises(ValueError, match="statistics are of 1 layers"):
        convert_to_gqa(model, 4, method="pca", calibration=other)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = torch.inf
    for method, refit in (("pca", True), ("mean", True), ("mean", "output")):
        with unchanged(broken), pytest.raises(ValueError, match="NaN or infinity"):
            convert_to_gqa(broken, 4, method=method, calibration=many(broken), refit=refit)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="refit='queries' must be one of 'none', 'output', 'full', 'descent', 'sc"),
    ):
        convert_to_gqa(model, 4, calibration=many(model), refit="queries")


def test_the_best_grouping_weighs_keys_and_values_by_their_shares() -> None:
    """Outputs in other units, such as a hundred times as large, group the heads no differently."""
    heads, x = random_heads(5, kv_heads=6)
    scaled = replace(heads, output=100 * heads.output)
    for method in ("mean", "pca"):
        losses = [group_loss(h, moment(x), method, method) for h in (heads, scaled)]
        for members in itertools.combinations(range(6), 2):
            assert abs(losses[0](members) - losses[1](members)) <= 1e-9
        whole = merge(heads, [range(6)], moment(x), method, method)
        assert abs(losses[0](range(6)) - whole.key_loss - whole.value_loss) <= 1e-9


@pytest.mark.parametrize("rope", [None, Rope("half", 4), Rope("interleaved", 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_what_the_search_of_groups_takes_for_a_loss_is_what_merging_loses(rope: Rope | None, bias: bool) -> None:
    """Of any group, whatever is rotated, and whether constants move into a bias of the output."""
    heads, x = random_heads(7, kv_heads=6, rope=rope, output_bias=bias)
    loss_of = group_loss(heads, moment(x), "pca", "pca")
    for groups in ([[0, 3], [1, 5], [2, 4]], [[0, 2, 5], [1, 3, 4]], [[0, 1, 2, 3, 4, 5]]):
        merged = merge(heads, groups, moment(x), "pca", "pca")
        want = merged.key_loss + merged.value_loss
        assert sum(map(loss_of, groups)) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_a_plan_prints_changes_nothing_and_is_applied_once() -> None:
    model = build("llama")
    with unchanged(model):
        plan = plan_gqa(model, [2, 4], method="pca", calibration=many(model))
    lines = str(plan).splitlines()
    assert "8 -> 2" in lines[1] and "8 -> 4" in lines[2] and "60" not in lines[0]
    assert "180 calibration tokens" in lines[-1] and "1,024 -> 384 bytes" in lines[-1]
    assert plan.apply() is model
    assert [layer.num_key_value_heads for layer in projected_layers(model)] == [2, 4]
    with unchanged(model), pytest.raises(ValueError, match="applied already"):
        plan.apply()
    other = build("llama")
    stale = plan_gqa(other, 2)
    with torch.no_grad():
        projected_layers(other)[0].key.weight.mul_(2)
    with unchanged(other), pytest.raises(ValueError, match=r"k_proj.weight' was written"):
        stale.apply()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_token_are_those_of_the_real_cache(dtype: torch.dtype) -> None:
    model = build("llama", "causal").to(dtype)
    plan = plan_gqa(model, [2, 4])
    for expected in (plan.bytes_before, plan.bytes_after):
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.arange(1, 11)[None], past_key_values=cache)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert held == 10 * expected == 10 * cache_bytes_per_token(model)
        if expected == plan.bytes_before:
            plan.apply()


def test_a_norm_on_the_keys_forbids_their_transform_and_not_that_of_values() -> None:
    model = build("qwen3")
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"k_norm.weight of layer 0 is between.*give key_method, one of mean"),
    ):
        convert_to_gqa(model, 2, method="pca")
    values = plan_gqa(model, 2, method="pca", key_method="mean")
    means = plan_gqa(model, 2)
    for ours, theirs in zip(values.layers, means.layers, strict=True):
        assert ours.value_loss < theirs.value_loss and ours.key_loss == theirs.key_loss
    values.apply()


def test_tied_projections_are_refused() -> None:
    model = build("llama")
    first, second = (layer.key for layer in projected_layers(model))
    second.weight = first.weight
    with unchanged(model), pytest.raises(ValueError, match=r"k_proj.weight is shared with"):
        convert_to_gqa(model, 2)


@pytest.mark.parametrize("family", ["llama", "bert", "phi3", "glm"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = build(family)
    convert_to_gqa(model, 2, method="pca", calibration=many(model))
    model.save_pretrained(tmp_path)
    expected = outputs(model, batch(model))
    again = copy.deepcopy(load_pretrained(tmp_path).eval())
    assert torch.equal(outputs(again, batch(model)), expected)
    if SAMPLES[family].grouped:
        plain = copy.deepcopy(CLASSES[family]["base"].from_pretrained(tmp_path).eval())
        assert torch.equal(outputs(plain, batch(model)), expected)


def test_heads_that_are_zero_are_merged_without_dividing_by_zero() -> None:
    model = build("llama")
    with torch.no_grad():
        for name in ("query", "key", "value", "output"):
            getattr(projected_layers(model)[0], name).weight.zero_()
    for method in METHODS:
        changed = copy.deepcopy(model)
        convert_to_gqa(changed, 2, method=method)
        assert outputs(changed, batch(model)).isfinite().all(), method


def test_the_private_helpers_agree_on_shapes() -> None:
    heads = read(projected_layers(build("phi3", kv_heads=4))[0])
    assert heads.query.shape == (4, 2, 8, 65) and heads.key.shape == (4, 8, 65) and heads.output.shape == (4, 2, 64, 8)
    assert pca.covariance(torch.eye(3))[-1].abs().max() == 0 and loss is not None
