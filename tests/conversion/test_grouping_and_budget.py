"""Which heads are merged together, and how a budget is spent: against all choices, and on models made for it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import batch, build, outputs
from torch import Tensor

from hf_attnkit import plan_gqa
from hf_attnkit.conversion import budget, grouping
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.layers import projected_layers


def test_best_grouping_finds_equal_heads() -> None:
    """Heads 0 and 2, and 1 and 3, are the same: grouped together, even their mean is exact."""
    model = build("llama", kv_heads=4).double()
    with torch.no_grad():
        for layer in projected_layers(model):
            for name in ("key", "value"):
                for p in getattr(layer, name).parameters():
                    halves = p.unflatten(0, (2, -1))
                    halves[1] = halves[0]
    before = outputs(model, batch(model))
    plan = plan_gqa(model, 2, grouping="best")
    assert all(layer.groups == ((0, 2), (1, 3)) for layer in plan.layers)
    assert all(layer.key_loss < 1e-12 and layer.value_loss < 1e-12 for layer in plan.layers)
    plan.apply()
    # A permutation of heads and sums in another order.
    assert (outputs(model, batch(model)) - before).abs().max() <= 1e-12 * before.abs().max()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4)]))
def test_groupings_against_all_of_them(seed: int, shape: tuple[int, int]) -> None:
    count, groups = shape
    generator = torch.Generator().manual_seed(seed)
    price = {
        g: float(torch.rand((), generator=generator)) for g in itertools.combinations(range(count), count // groups)
    }
    found = grouping.best(count, groups, price.__getitem__)
    assert sorted(h for g in found for h in g) == list(range(count))

    def everything(left: tuple[int, ...]) -> float:
        if not left:
            return 0.0
        rest = [(left[0], *o) for o in itertools.combinations(left[1:], count // groups - 1)]
        return min(price[g] + everything(tuple(h for h in left if h not in g)) for g in rest)

    assert abs(sum(price[g] for g in found) - everything(tuple(range(count)))) < 1e-12


def test_grouping_of_many_heads_by_swaps() -> None:
    """20 heads in groups of 10, too many to try all: the planted groups are found."""
    planted = {h for h in range(20) if (h * 7) % 20 < 10}

    def price(group: tuple[int, ...]) -> float:
        inside = len(planted & set(group))
        return float(inside * (10 - inside))

    found = grouping.best(20, 2, price)
    assert planted in [set(g) for g in found] and sum(map(price, found)) == 0


def test_many_heads_in_pairs_are_grouped_by_swaps() -> None:
    """32 heads have more sets of heads than can be gone through, though few pairs."""
    found = grouping.best(32, 16, lambda pair: abs((pair[1] - pair[0]) % 32 - 16))
    assert found == [(head, head + 16) for head in range(16)]


def several(model: Any) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(3)]


def test_the_default_grouping() -> None:
    """The best where batches are given and pca merges keys and values; else adjacent, as converted checkpoints are."""
    model = build("llama", kv_heads=4)
    batches = several(model)
    statistics = collect(model, projected_layers(model), batches)
    for expected, options in {
        "best": [{"calibration": batches}, {"calibration": batches, "refit": "none"}],
        "adjacent": [
            {}, {"calibration": statistics}, {"calibration": batches, "method": "mean"}, {"method": "pca"},
            {"calibration": batches, "key_method": "mean", "method": "pca"},
            {"calibration": batches, "grouping": "adjacent"},
        ],
    }.items():  # fmt: skip
        assert {plan_gqa(model, 2, **each).grouping for each in options} == {expected}
    own = build("qwen3", kv_heads=4)  # keys are merged by the mean
    assert plan_gqa(own, 2, calibration=several(own)).grouping == "adjacent"
    many = build("llama", heads=32, kv_heads=32)
    assert plan_gqa(many, 8, calibration=several(many), refit="none").grouping == "adjacent"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), total=st.integers(3, 12))
def test_budget_against_all_choices(seed: int, total: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = [{n: float(torch.rand((), generator=generator)) for n in (1, 2, 4)} for _ in range(3)]
    chosen = budget.spend(losses, total)
    possible = [c for c in itertools.product((1, 2, 4), repeat=3) if sum(c) <= total]
    least = min(sum(losses[i][n] for i, n in enumerate(c)) for c in possible)
    assert sum(chosen) <= total and abs(sum(losses[i][n] for i, n in enumerate(chosen)) - least) < 1e-12


def test_budget_is_spent_where_it_costs_least() -> None:
    """Layer 1 has equal heads, so it can do with one; a uniform budget cannot know."""
    model = build("llama", kv_heads=4)
    with torch.no_grad():
        layer = projected_layers(model)[1]
        for name in ("key", "value"):
            for p in getattr(layer, name).parameters():
                p.copy_(p[:8].repeat(4, *[1] * (p.dim() - 1)))
    assert [layer.num_key_value_heads for layer in plan_gqa(model, budget=0.65).layers] == [2, 2]
    plan = plan_gqa(model, budget=0.65, uniform=False, method="pca")
    assert [layer.num_key_value_heads for layer in plan.layers] == [4, 1]
    before = outputs(model, batch(model))
    plan.apply()
    torch.testing.assert_close(outputs(model, batch(model)), before, rtol=0, atol=1e-4 * before.abs().max().item())
