"""The ridge that a layer gets: cross-validation against brute force, its limit, and folds of whole sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import batch, build
from torch import Tensor, nn

from hf_attnkit import convert_to_gqa, last_change, prune_heads
from hf_attnkit.models.layers import weight_of
from hf_attnkit.refitting import ridge as ridges
from hf_attnkit.refitting.folds import Folds
from hf_attnkit.refitting.head_scales import choose_scale_ridge, scaled
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.outputs import OutputSums, solve
from hf_attnkit.refitting.report import HeldOut, RefitReport, RefittedLayer
from hf_attnkit.refitting.ridge import MEASURED, RIDGES, SHARES, Fold, choose_ridge, num_folds, total
from hf_attnkit.refitting.token_weights import TOKEN_WEIGHTS

Tokens = tuple[Tensor, Tensor, Tensor]  # a, y and what each counts


def folds_of(
    linear: nn.Module, signal: float, noise: float, seed: int = 0, sizes: tuple[int, ...] = (40, 9, 25)
) -> Any:
    """Tokens whose target is what another projection gives, and noise; and their sums."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outputs, inputs = weight_of(linear).shape
    other = weight_of(linear) + signal * normal(outputs, inputs)
    scale = torch.logspace(0, -2, inputs, dtype=torch.float64)
    data: list[Tokens] = []
    sums = []
    for size in sizes:
        a = normal(size, inputs) * scale + 0.3
        y = a @ other.T + 0.7 * signal + noise * normal(size, outputs)
        data.append((a, y, 0.1 + normal(size).square()))
        sums.append(Fold(OutputSums(linear), OutputSums(linear)))
        sums[-1].alike.add(a, linear(a), y)
        sums[-1].seen.add(a, linear(a), y, data[-1][2])
    return data, sums


def brute_force(linear: Any, data: list[Tokens], ridge: float | None, share: float) -> float:
    """The weighted error on each fold of a fit to the others, by least squares with the ridge as rows."""
    old, lost = linear.weight.detach(), 0.0
    for index in range(len(data)):
        a, y, w = (torch.cat(parts) for parts in zip(*(data[:index] + data[index + 1 :]), strict=True))
        w = 1 - share + share * w
        at, yt, wt = data[index]
        wt = 1 - MEASURED + MEASURED * wt
        if ridge is None:
            lost += float((wt[:, None] * (linear(at) - yt).square()).sum())
            continue
        has_bias = linear.bias is not None
        shift, aim = ((w[:, None] * x).sum(0) / w.sum() if has_bias else torch.zeros_like(x[0]) for x in (a, y))
        weight = old
        if ridge != math.inf:
            rows = (a - shift) * w.sqrt()[:, None]
            strength = (ridge * rows.square().sum(0).mean()).sqrt()
            rows = torch.cat([rows, strength * torch.eye(rows.shape[1], dtype=rows.dtype)])
            weight = torch.linalg.lstsq(rows, torch.cat([(y - aim) * w.sqrt()[:, None], strength * old.T])).solution.T
        lost += float((wt[:, None] * ((at - shift) @ weight.T + aim - yt).square()).sum())
    return lost


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("signal, noise", [(1.0, 0.3), (0.05, 1.0), (0.3, 0.0)])
def test_the_ridge_is_the_one_that_brute_force_finds(has_bias: bool, signal: float, noise: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 5, bias=has_bias).double()
    with torch.no_grad():
        data, sums = folds_of(linear, signal, noise)
        chosen = choose_ridge(sums, linear)
        errors = {(r, s): brute_force(linear, data, r, s) for s in SHARES for r in (*RIDGES, None)}
    best = min(errors, key=lambda choice: errors[choice])
    energy = sum(float(((1 - MEASURED + MEASURED * w)[:, None] * y.square()).sum()) for _, y, w in data)
    assert chosen.ridge == best[0] and (chosen.ridge is None or chosen.share == best[1])
    # Differences of sums of squares, of which the errors are at least 1e-4.
    assert chosen.after == pytest.approx(errors[best] / energy, rel=1e-9)
    assert chosen.before == pytest.approx(errors[None, MEASURED] / energy, rel=1e-9)
    if signal == 1.0:
        assert chosen.ridge is not None and chosen.ridge < 1, "nothing was tested"


@pytest.mark.parametrize("signal, noise", [(1.0, 0.3), (0.3, 0.3), (0.05, 1.0)])
def test_float32_chooses_as_float64(signal: float, noise: float) -> None:
    torch.manual_seed(0)
    wide = nn.Linear(12, 5).double()
    narrow = nn.Linear(12, 5)
    with torch.no_grad():
        narrow.load_state_dict(wide.state_dict())
        wide.load_state_dict(narrow.state_dict())
        _, sums = folds_of(wide, signal, noise)
        chosen, reference = choose_ridge(sums, narrow), choose_ridge(sums, wide)
    assert (chosen.ridge, chosen.share) == (reference.ridge, reference.share)
    # Differences of sums of squares a few times as large, of some hundred terms each.
    assert chosen.after == pytest.approx(reference.after, rel=2**10 * torch.finfo(torch.float32).eps)


def test_targets_that_are_noise_leave_the_projection() -> None:
    """What it puts out is right already but for noise: the ridge is infinity, or not even the bias moves."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 5).double()
    with torch.no_grad():
        for seed in range(5):
            _, sums = folds_of(linear, 0.0, 1.0, seed)
            chosen = choose_ridge(sums, linear)
            assert chosen.ridge is None or chosen.ridge >= 10
            assert chosen.after <= chosen.before
        still = nn.Linear(12, 5, bias=False).double()
        _, sums = folds_of(still, 0.0, 0.0)
    assert choose_ridge(sums, still).after == pytest.approx(0, abs=1e-12)
    weight, bias = solve(total(fold.alike for fold in sums), still, math.inf)
    assert torch.equal(weight, still.weight) and bias is None


def test_factors_of_heads_get_the_ridge_that_brute_force_finds() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 5).double()
    with torch.no_grad():
        data, sums = folds_of(linear, 0.4, 0.5)
        sums = [fold.seen for fold in sums]
        chosen = choose_scale_ridge(sums, linear, head_dim=3)
        errors = []
        for ridge in RIDGES[:-1]:
            lost = 0.0
            for index, (a, y, w) in enumerate(data):
                weight, bias = scaled(total(sums[:index] + sums[index + 1 :]), linear, 3, ridge)
                lost += float((w[:, None] * (a @ weight.T + bias - y).square()).sum())
            errors.append(lost)
    energy = sum(float((w[:, None] * y.square()).sum()) for _, y, w in data)
    best = min(range(len(errors)), key=errors.__getitem__)
    assert chosen.ridge == RIDGES[best] and chosen.after == pytest.approx(errors[best] / energy, rel=1e-9)
    assert chosen.after < chosen.before


def test_folds_are_whole_sequences() -> None:
    tokens = torch.zeros(3, 7, dtype=torch.long)
    folds = Folds([{"input_ids": tokens}, {"input_ids": tokens[:2]}], 4)
    assert folds.of(0, torch.Size([3, 7])).tolist() == [[0] * 7, [1] * 7, [2] * 7]
    assert folds.of(1, torch.Size([2, 7])).tolist() == [[3] * 7, [0] * 7]
    # Two windows of each image, one after the other; and two calls of one module.
    assert folds.of(0, torch.Size([6, 1]))[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert folds.of(0, torch.Size([6, 1]), calls=2)[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    # Fewer sequences than folds: stretches of each.
    assert Folds([{"input_ids": tokens}], 4).of(0, torch.Size([3, 8])).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 3
    assert Folds([{"x": tokens}], 4).of(0, torch.Size([4])).tolist() == [0, 1, 2, 3]


def test_what_is_set_aside_is_in_no_fold() -> None:
    tokens = torch.zeros(3, 7, dtype=torch.long)
    folds = Folds([{"input_ids": tokens}, {"input_ids": tokens[:2]}], 2, [[1], []])
    assert folds.num_sequences == 4 and folds.has_aside
    assert folds.of(0, torch.Size([3, 7]))[:, 0].tolist() == [0, 2, 1]
    assert folds.of(1, torch.Size([2, 7]))[:, 0].tolist() == [0, 1]
    assert folds.of(0, torch.Size([6, 1]), calls=2)[:, 0].tolist() == [0, 2, 1, 0, 2, 1]
    aside = folds.is_aside(0, torch.Size([3, 7]))
    assert aside is not None and aside.all(1).tolist() == [False, True, False]
    # Fewer sequences than folds: what is set aside is whole all the same.
    few = Folds([{"input_ids": tokens[:2]}], 4, [[0]])
    assert few.of(0, torch.Size([2, 8])).tolist() == [[4] * 8, [0, 0, 1, 1, 2, 2, 3, 3]]
    assert Folds([{"input_ids": tokens}], 2).is_aside(0, torch.Size([3, 7])) is None


def test_sums_of_folds_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(31, 32)  # 8 * 32 * 64 bytes a fold
    assert num_folds(linear) == ridges.FOLDS
    assert num_folds(linear, 2) == ridges.FOLDS
    for limit, count in ((3 * 16384, 3), (16384, 2)):
        monkeypatch.setattr(ridges, "FOLD_BYTES", limit)
        assert num_folds(linear) == count and num_folds(linear, 2) == 2
    monkeypatch.setattr(ridges, "FOLD_BYTES", 5 * 16384)
    assert num_folds(linear, aside=1) == 4


@pytest.mark.parametrize("weights", TOKEN_WEIGHTS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_each_layer_gets_its_own_and_is_never_worse_unseen(family: str, weights: str) -> None:
    model = build(family).double() if family != "gpt2" else _gpt2()
    batches = [batch(model, seed=seed) for seed in range(12)]
    options = RefitOptions("output", token_weights=weights, held_out=0.0)
    prune_heads(model, {0: [0, 1]}, calibration=batches, refit=options)
    report = last_change(model).refit  # type: ignore[union-attr]
    for layer in report.layers:
        assert layer.ridge is None or layer.ridge in RIDGES
        assert layer.unseen_after <= layer.unseen_before
        # A fit in which tokens count otherwise than where they are measured need not be better in the sample.
        assert layer.error_after <= layer.error_before or layer.share not in (None, MEASURED)
        assert (layer.share is None) == (weights != "gradient")
    assert report.held_out is None and report.kept == "output"


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=512, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval().double()


def test_how_many_tokens_a_refit_can_use() -> None:
    """Noise of variance v and k unknowns for each output: in the sample v (1 - k/n), unseen v (1 + k/n)."""
    k, n = 50, 1000
    layer = RefittedLayer(0, None, None, 1.0, 1 - k / n, 1.0, 1 + k / n, 0.1, None, k)
    report = RefitReport("output", n, "uniform", (layer,), None)
    # 10 % above what any number of tokens reaches is k / n = 0.1.
    assert report.num_tokens_needed == 500
    still = RefittedLayer(0, None, None, 1, 1, 1, 1, None, None, k)
    assert "gains nothing" in RefitReport("output", n, "uniform", (still,), None).warning
    # What the outputs gain on sequences held out says more than the layers' errors.
    for error, warned in ((0.5, False), (0.995, True)):
        held = HeldOut(9, {"none": 1.0, "output": error}, "output", True)
        assert ("gains nothing" in RefitReport("output", n, "uniform", (still,), held).warning) == warned
    few = RefitReport("output", 40, "uniform", (RefittedLayer(0, None, None, 1, 0.1, 1, 0.5, 1.0, None, k),), None)
    assert "40 tokens were fitted to output projections of 50 inputs" in few.warning


@pytest.mark.parametrize(
    "options", [{"ridge": -1}, {"held_out": 1.0}, {"token_weights": "all"}, {"query_steps": 0.5}, {"beginnings": -1}]
)
def test_options_name_what_is_wrong(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be"):
        RefitOptions("output", **options)
    with pytest.raises(ValueError, match="refit='all' must be one of"):
        RefitOptions("all")


@pytest.mark.parametrize(
    ("fits", "options"),
    [
        ("none", {"ridge": 0.1}),
        ("none", {"held_out": 0.0}),
        ("output", {"query_steps": 3}),
        ("scale", {"query_steps": 3}),
    ],
)
def test_options_that_nothing_reads_are_refused(fits: str, options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} has no effect on a refit of .*'{fits}'"):
        RefitOptions(fits, **options)


def test_options_go_where_words_go() -> None:
    model = build("llama")
    batches = [batch(model, seed=seed) for seed in range(4)]
    convert_to_gqa(model, 2, calibration=batches, refit=RefitOptions("output", ridge=2.0))
    assert {layer.ridge for layer in last_change(model).refit.layers} == {2.0}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="needs calibration batches"):
        prune_heads(model, {0: [0, 1, 2, 3]}, refit=RefitOptions("output"))
