"""Single tokens that a decoder's refit has as further texts, and which fold they are in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import build
from torch import Tensor

from hf_attnkit import last_change, prune_heads
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.refitting.beginnings import beginnings
from hf_attnkit.refitting.folds import Folds
from hf_attnkit.refitting.head_scales import choose_scale_ridge, scaled
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.outputs import OutputSums, solve
from hf_attnkit.refitting.report import refit_line
from hf_attnkit.refitting.ridge import RIDGES, Fold, choose_ridge, total

LONG = torch.arange(3, 67).repeat(2, 3)  # (2, 192), of 64 different tokens
LONG[1, 0] = 4


def made(batches: list[dict[str, Any]], aside: list[list[int]], most: int = 256, family: str = "llama") -> Any:
    model = build(family, "causal" if family != "bert" else "base")
    return beginnings(attention_layers(model), batches, aside, most)


def test_which_tokens_begin_a_text() -> None:
    inputs = {"input_ids": LONG, "use_cache": False}
    found = made([inputs], [[]])
    assert found["use_cache"] is False and found["input_ids"].shape == (10, 1)  # a 32nd of 384, less two that there are
    tokens = set(found["input_ids"].flatten().tolist())
    assert len(tokens) == 10 and not tokens & {3, 4} and tokens <= set(range(3, 67))
    assert made([inputs], [[]], 5)["input_ids"].shape == (3, 1)
    assert torch.equal(made([inputs], [[]])["input_ids"], found["input_ids"])
    # None of what is held out: its only row of other tokens.
    other = {"input_ids": torch.arange(67, 90).repeat(1, 8)}
    assert set(made([inputs, other], [[], [0]])["input_ids"].flatten().tolist()) <= set(range(3, 67))
    # Padding on the left begins no text.
    padded, mask = LONG.clone(), torch.ones_like(LONG)
    for row, size in enumerate((5, 6)):
        padded[row, :size], mask[row, :size] = 1, 0
    found = made([{"input_ids": padded, "attention_mask": mask}], [[]])
    assert len(found["input_ids"]) == 9 and not set(found["input_ids"].flatten().tolist()) & {1, 8, 9}


@pytest.mark.parametrize("case", ["none", "encoder", "same", "many", "positions", "embeds", "nested", "mask"])
def test_where_none_are_made(case: str) -> None:
    inputs: dict[str, Any] = {"input_ids": LONG}
    if case == "same":
        inputs["input_ids"] = torch.cat([torch.full((2, 1), 2), LONG], dim=1)
    elif case == "many":
        inputs["input_ids"] = torch.cat([torch.arange(3, 27)[:, None], LONG.view(24, 16)], dim=1)
    elif case == "positions":
        inputs["position_ids"] = torch.arange(192).expand(2, -1)
    elif case == "embeds":
        inputs = {"inputs_embeds": torch.randn(2, 192, 4)}
    elif case == "nested":
        inputs["past_key_values"] = ((LONG, LONG),)
    elif case == "mask":
        inputs["attention_mask"] = torch.ones(2, 1, 192, 192)
    most, family = (0 if case == "none" else 256), "bert" if case == "encoder" else "llama"
    assert made([inputs], [[]], most, family) is None


def test_folds_of_beginnings_are_their_own() -> None:
    """Two texts are cut into stretches, as without them; single tokens are in a fold that is none of these."""
    texts, single = {"input_ids": LONG}, {"input_ids": torch.arange(10)[:, None]}
    alone, both = Folds([texts], 5), Folds([texts, single], 5, [[], []], single)
    assert both.num_sequences == 2 and both.has_further and not alone.has_further
    assert torch.equal(both.of(0, LONG.shape), alone.of(0, LONG.shape))
    assert both.of(1, torch.Size([10, 1])).unique().tolist() == [6]


def test_a_ridge_is_chosen_on_texts_that_beginnings_are_fitted_with() -> None:
    """By the definition: each fold left out, the others fitted with what is further, and its error taken."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4).double()

    common, other = torch.randn(2, 6, 4).double()

    def sums(count: int, shift: Tensor) -> Fold:
        found = OutputSums(linear)
        a = torch.randn(count, 6).double()
        found.add(a, linear(a).detach(), linear(a).detach() + a @ shift + torch.randn(count, 4).double())
        return Fold(found)

    folds, further = [sums(12, common) for _ in range(3)], sums(12, other)
    lost = []
    for ridge in RIDGES:
        lost.append(0.0)
        for fold in folds:
            others = total(each.alike for each in (*folds, further) if each is not fold)
            weight, bias = solve(others, linear, ridge)
            lost[-1] += float(fold.alike.lost_by(weight, bias))
    found = choose_ridge(folds, linear, [further])
    assert found.ridge == RIDGES[min(range(len(lost)), key=lost.__getitem__)]
    square = sum(float(fold.alike.yy) for fold in folds)
    assert found.after == pytest.approx(min(lost) / square, rel=1e-6)
    assert found.ridge != choose_ridge(folds, linear).ridge, "nothing to tell apart"


def test_factors_of_heads_are_chosen_so_too() -> None:
    """By the definition, as above; heads of two inputs each."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4).double()

    def sums(count: int, factors: list[float]) -> OutputSums:
        found, a = OutputSums(linear), torch.randn(count, 6).double()
        found.add(a, linear(a).detach(), linear(a * torch.tensor(factors).repeat_interleave(2)).detach())
        noise = torch.randn(count, 4).double()
        found.add(a, linear(a).detach(), linear(a).detach() + noise)
        return found

    folds, further = [sums(12, [2.0, 0.5, 1.0]) for _ in range(3)], sums(12, [0.2, 3.0, 1.0])
    lost = []
    for ridge in RIDGES[:-1]:
        lost.append(0.0)
        for fold in folds:
            others = total(each for each in (*folds, further) if each is not fold)
            lost[-1] += float(fold.lost_by(*scaled(others, linear, 2, ridge)))
    found = choose_scale_ridge(folds, linear, 2, [further])
    assert found.ridge == RIDGES[min(range(len(lost)), key=lost.__getitem__)]
    assert found.after == pytest.approx(min(lost) / sum(float(fold.yy) for fold in folds), rel=1e-6)
    assert found.after != choose_scale_ridge(folds, linear, 2).after


def test_a_refit_has_them() -> None:
    """One text whose tokens are all others than another's: the refit is nearer at the other's first tokens."""
    original = build("llama", "causal")
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 64, (1, 320), generator=generator)
    reports: dict[int, Any] = {}
    errors: dict[int, Tensor] = {}
    first = torch.arange(3, 64)[:, None]
    with torch.no_grad():
        wanted = original(first, output_hidden_states=True).hidden_states[1]
    for count in (0, 256):
        options = RefitOptions("output", ridge=1e-3, beginnings=count)
        model = prune_heads(copy.deepcopy(original), {0: [0, 1]}, calibration=[{"input_ids": text}], refit=options)
        reports[count] = last_change(model).refit  # type: ignore[union-attr]
        with torch.no_grad():
            errors[count] = (model(first, output_hidden_states=True).hidden_states[1] - wanted).square().sum()
    assert reports[0].num_tokens == 320 and reports[256].num_tokens == 320 + 10 - 1
    assert errors[256] < errors[0]
    assert reports[0].num_beginnings == 0 and "beginnings" not in refit_line(reports[0])
    assert reports[256].num_beginnings == 9
    assert refit_line(reports[256]).startswith("refit output on 329 tokens with 9 single ones as beginnings of texts")
