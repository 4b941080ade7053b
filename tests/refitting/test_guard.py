"""Sequences held out, what is compared on them, and what is kept."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.refits import plain
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import hf_attnkit.refitting.guard as guard_module
import hf_attnkit.refitting.refit as refit_module
from hf_attnkit import convert_to_gqa, last_change, plan_gqa, prune_heads, swap_attention
from hf_attnkit.models.layers import attention_layers, projected_layers
from hf_attnkit.observing.outputs import OutputDistance, final_outputs, real_outputs
from hf_attnkit.observing.rows import num_rows, rows_of, set_aside
from hf_attnkit.refitting.guard import is_worse
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.queries import NotLinearError


def many(model: Any, count: int = 6) -> list[dict[str, Tensor]]:
    return [batch(model, seed=seed) for seed in range(count)]


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def divergence(now: Tensor, was: Tensor) -> Tensor:
    """`(..., positions)` in nats, written out."""
    return (was.softmax(-1) * (was.log_softmax(-1) - now.log_softmax(-1))).sum(-1)


def distance(model: Any, original: Any, batches: list[dict[str, Tensor]]) -> float:
    """Written out, for logits of classes or of tokens."""
    with torch.no_grad():
        now, was = ([each(**inputs).logits for inputs in batches] for each in (model, original))
    if was[0].dim() == 3:
        masks = torch.cat([inputs["attention_mask"].flatten() for inputs in batches]).bool()
        now, was = (torch.cat([x.flatten(0, 1) for x in each])[masks] for each in (now, was))
        return float(divergence(now, was).mean())
    now, was = torch.cat(now), torch.cat(was)
    return float((now - was).square().sum() / (was - was.mean(0)).square().sum())


def test_sequences_are_set_aside_evenly() -> None:
    batches = [
        {"input_ids": torch.arange(8).view(4, 2), "attention_mask": torch.ones(4, 2), "use_cache": False},
        {"input_ids": torch.arange(8, 20).view(6, 2), "position_ids": torch.ones(1, 2)},
    ]
    assert set_aside(batches, 0.2) == [[2], [3]]
    held = [rows_of(each, rows) for each, rows in zip(batches, set_aside(batches, 0.2), strict=True)]
    assert [b["input_ids"][:, 0].tolist() for b in held] == [[4], [14]]
    assert held[0]["use_cache"] is False and held[1]["position_ids"].shape == (1, 2)
    assert set_aside(batches, 0.0) == [[], []] and set_aside(batches[:1], 0.01) == [[2]]
    assert set_aside([rows_of(batches[0], [1])], 0.5) == [[]]
    assert torch.equal(rows_of(batches[0], [1, 0, 3, 2])["input_ids"][:, 0], torch.tensor([2, 0, 6, 4]))


def test_what_cannot_be_told_apart_stays_together() -> None:
    tokens = torch.ones(2, 5, dtype=torch.long)
    for batch_of_one in (
        {"input_ids": tokens, "encoder_outputs": (torch.ones(2, 5, 4),)},
        {"input_ids": tokens, "pixel_values": torch.ones(7, 4)},
        {"input_ids": tokens, "position_ids": torch.ones(3, 2, 5)},
    ):
        assert num_rows(batch_of_one) == 1
        assert set_aside([batch_of_one] * 4, 0.25) == [[], [], [0], []]
        assert rows_of(batch_of_one, [0]).items() == batch_of_one.items()
    padding = {"input_ids": tokens, "attention_mask": torch.tensor([[1] * 5, [0] * 5])}
    assert set_aside([padding, padding], 0.25) == [[], [0]]
    assert set_aside([padding, padding], 0.9) == [[], []], "no real sequence would be left"


@pytest.mark.parametrize("family, head", [("bert", "sequence"), ("llama", "causal"), ("bert", "base")])
def test_distances_by_definition(family: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build(family, head)
    changed = prune_heads(copy.deepcopy(original), {0: [0, 1, 2, 3]})
    batches = many(original)
    found = OutputDistance(original, batches)
    assert not found.now().any()
    with torch.no_grad():
        wanted, now = ([final_outputs(m(**b)) for b in batches] for m in (original, changed))
    (name,) = wanted[0]
    real = [
        [real_outputs(name, one[name], inputs) for one, inputs in zip(each, batches, strict=True)]
        for each in (wanted, now)
    ]
    was, is_now = map(torch.cat, real)
    if head != "sequence":
        assert len(was) == sum(int(b["attention_mask"].sum()) for b in batches)
    assert found.is_divergence == (head == "causal")
    variance = float((was - was.mean(0)).square().sum()) / len(was)

    def lost(now: Tensor, was: Tensor) -> Tensor:
        return divergence(now, was) if head == "causal" else (now - was).square().sum(-1) / variance

    expected = float(lost(is_now, was).mean())
    found._model = changed
    assert float(found.now().sum() / found.counts.sum()) == pytest.approx(expected, rel=1e-5)
    masks = [b["attention_mask"].bool() if head != "sequence" else torch.ones(3).bool() for b in batches]
    own = []
    for n, w, mask in zip(now, wanted, masks, strict=True):
        own += (lost(n[name], w[name]) * mask).view(3, -1).sum(1).tolist()
    assert found.now().tolist() == pytest.approx(own, rel=1e-4)
    sizes = [1] * 18 if head == "sequence" else [int(row.sum()) for mask in masks for row in mask]
    assert found.counts.tolist() == sizes
    # Every other position where there are too many numbers; of a random model these are alike.
    monkeypatch.setattr("hf_attnkit.observing.outputs.KEPT", was.numel() // 2)
    half = OutputDistance(original, batches)
    assert sum(t.numel() for parts in half._wanted for t in parts) <= was.numel() * 0.7
    half._model = changed
    assert float(half.now().sum() / half.counts.sum()) == pytest.approx(expected, rel=1)


def test_words_by_their_probabilities() -> None:
    """A shift of all logits, or of one that no probability has, is no difference; a changed word is."""
    original = build("llama", "causal")
    head, inputs = original.lm_head, batch(original)
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[7] = -torch.inf
        found = OutputDistance(original, [inputs])
        head.bias += 3.0
        assert float(found.now().sum() / found.counts.sum()) == pytest.approx(0, abs=1e-6)
        head.bias[5] += 2.0
        assert float(found.now().sum() / found.counts.sum()) > 1e-3


def test_few_long_sequences_are_compared_by_stretches() -> None:
    """Of one text a single position, such as the first, can be off by more than all others are better."""
    original = build("llama", "causal")
    changed = prune_heads(copy.deepcopy(original), {0: [0, 1, 2, 3]})
    inputs = batch(original, (40, 24))
    found = OutputDistance(original, [inputs])
    assert found.num_sequences == 2 and found.counts.tolist() == [5.0] * 8 + [3.0] * 8
    found._model = changed
    with torch.no_grad():
        lost = divergence(changed(**inputs).logits, original(**inputs).logits)
    real = inputs["attention_mask"].bool()
    by_stretch = [each.sum() for row, mask in zip(lost, real, strict=True) for each in row[mask].chunk(8)]
    shares = found.now() / found.now().sum()
    torch.testing.assert_close(shares, torch.stack(by_stretch).double() / sum(by_stretch), rtol=1e-4, atol=0)
    better = torch.full((16,), 1.0, dtype=torch.float64)
    worse = torch.tensor([20.0] + [0.5] * 15, dtype=torch.float64)  # a mean of 1.7, by the first stretch alone
    assert not is_worse(worse, better, torch.ones(16)) and is_worse(better + 0.1, better, torch.ones(16))
    assert is_worse(worse.sum()[None], better.sum()[None], torch.tensor([16.0]))  # what a single number says
    short = OutputDistance(build("bert", "sequence"), [batch(original, (9, 5))])
    assert short.counts.tolist() == [1.0, 1.0]  # one answer each, which nothing can cut


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_refit_that_harms_is_not_kept(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Two sequences, no ridge: what fits them is far off on a third. The model is bit for bit that without a refit."""
    original = build(family) if family != "gpt2" else build("gpt2", "causal")
    batches = many(original, 1)
    alone = prune_heads(copy.deepcopy(original), {0: [0]})
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    fitted = prune_heads(
        copy.deepcopy(original), {0: [0]}, calibration=batches, refit=RefitOptions("output", ridge=0.0)
    )
    report = last_change(fitted).refit  # type: ignore[union-attr]
    assert report.held_out.num_sequences == 1 and report.held_out.errors["output"] > report.held_out.errors["none"]
    assert report.kept == "none" and same(fitted, state(alone))
    assert "kept: none" in str(last_change(fitted)) and "too little calibration" in str(last_change(fitted))
    unguarded = RefitOptions("output", ridge=0.0, held_out=0.0)
    harmed = prune_heads(copy.deepcopy(original), {0: [0]}, calibration=batches, refit=unguarded)
    assert not same(harmed, state(alone)) and last_change(harmed).refit.kept == "output"  # type: ignore[union-attr]


def parts(batches: list[dict[str, Tensor]]) -> tuple[list[Any], list[Any]]:
    """What the compared model is fitted to, and what it is compared on, by default."""
    aside = set_aside(batches, 0.1)
    rows = [range(num_rows(each)) for each in batches]
    stay = [[row for row in own if row not in out] for own, out in zip(rows, aside, strict=True)]
    return tuple(  # type: ignore[return-value]
        [rows_of(each, own) for each, own in zip(batches, chosen, strict=True) if own] for chosen in (stay, aside)
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_kept_is_fitted_to_everything(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight for weight the refit of all sequences with these ridges and no guard."""
    monkeypatch.setattr(guard_module, "is_worse", lambda *_: False)
    original = build(family, "sequence" if family == "bert" else "causal").double()
    batches = many(original, 20)
    held = parts(batches)[1]
    merged = convert_to_gqa(copy.deepcopy(original), 2, method="mean")
    for word in ("output", "scale"):
        options = RefitOptions(word, ridge=0.1)
        model = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=options)
        report = last_change(model).refit  # type: ignore[union-attr]
        assert report.kept == word and report.held_out.num_sequences == sum(len(b["input_ids"]) for b in held) == 6
        assert report.held_out.errors["none"] == pytest.approx(distance(merged, original, held), rel=1e-4)
        fitted = convert_to_gqa(copy.deepcopy(original), 2, method="mean", calibration=batches, refit=plain(word))
        everything = last_change(fitted).refit  # type: ignore[union-attr]
        assert report.num_tokens == everything.num_tokens
        for (name, now), was in zip(model.named_parameters(), fitted.parameters(), strict=True):
            # Sums of other parts, solved by normal equations, whose condition the ridge keeps below 1e5 or so.
            torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9, msg=name)
        for now, was in zip(report.layers, everything.layers, strict=True):
            assert now.error_after == pytest.approx(was.error_after, rel=1e-9)


@pytest.mark.parametrize("how", ["pruned", "merged"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_compared_is_the_refit_without_what_is_held_out(family: str, how: str) -> None:
    """As if the others were all there is, in all layers: also where a layer makes up for what those below it lost."""

    def fitted(batches: list[dict[str, Tensor]], held_out: float) -> Any:
        model, options = copy.deepcopy(original), RefitOptions("output", ridge=0.1, held_out=held_out)
        if how == "pruned":
            return prune_heads(model, {0: [0, 3], 1: [1], 2: [2]}, calibration=batches, refit=options)
        return convert_to_gqa(model, 2, method="mean", calibration=batches, refit=options)

    original = build(family, "sequence" if family == "bert" else "causal", num_hidden_layers=3).double()
    batches = many(original, 5)
    stay, held = parts(batches)
    report = last_change(fitted(batches, 0.1)).refit  # type: ignore[union-attr]
    wanted = distance(fitted(stay, 0.0), original, held)
    assert report.held_out.errors["output"] == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(distance(fitted(batches, 0.0), original, held), rel=1e-2), "nothing to tell apart"


def test_what_is_worse_by_no_more_than_chance_is_kept() -> None:
    """The standard error of the mean difference decides: a single sequence that flips is not enough."""
    few, one, counts = torch.zeros(20), torch.zeros(20), torch.ones(20)
    one[3] = 5.0  # worse by 0.25 on the mean, whose standard error is 0.25
    few[::3] = 5.0
    assert not is_worse(one, torch.zeros(20), counts) and is_worse(few, torch.zeros(20), counts)
    assert not is_worse(torch.zeros(20), few, counts) and not is_worse(few, few, counts)
    assert is_worse(torch.ones(1), torch.zeros(1), counts[:1])
    assert is_worse(torch.full((3,), torch.nan), few[:3], counts[:3])


def test_the_standard_error_is_over_sequences() -> None:
    """1,000 positions of 4 sequences, all of one alike: 4 numbers, against the spread of many draws."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([400.0, 100.0, 300.0, 200.0])
    rejected = 0
    for _ in range(2000):
        each = torch.randn(4, generator=generator)  # the error of every position of a sequence
        rejected += is_worse(each * counts, torch.zeros(4), counts)
    # Of no difference a standard error is exceeded on one side in 16 % of draws, of few sequences somewhat more often;
    # counted over positions the bound would be a sixteenth of it, and half of all draws were above.
    assert 0.12 < rejected / 2000 < 0.28
    # Sequences of one error per position differ in nothing, whatever their lengths.
    assert is_worse(0.1 * counts, torch.zeros(4), counts)


def test_queries_alone_are_kept_where_outputs_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    original = build("bert", "sequence")
    with torch.no_grad():  # values that merge exactly, so that keys alone lose
        for layer in projected_layers(original):
            for parameter in layer.value.parameters():
                halves = parameter.unflatten(0, (4, 2, -1))
                halves[:, 1] = halves[:, 0]
    batches = many(original, 30)
    real_solve = refit_module.solve

    def worse(sums: Any, linear: Any, ridge: float) -> Any:
        if linear is attention_layers(original)[0].output:
            return linear.weight.detach().clone(), linear.bias.detach().clone()
        weight, bias = real_solve(sums, linear, ridge)
        return -5 * weight, bias

    monkeypatch.setattr(refit_module, "solve", worse)
    plan = plan_gqa(original, 4, method="mean", calibration=batches)
    merged = convert_to_gqa(copy.deepcopy(original), 4, method="mean")
    plan.apply()
    assert plan.report is not None and plan.report.refit is not None
    assert plan.report.refit.kept == "queries", plan.report
    for (name, now), was in zip(original.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(now, was) == ("query" not in name), name


def test_a_single_sequence_is_fitted_without_a_comparison() -> None:
    model = build("llama")
    inputs = [{"input_ids": torch.arange(1, 41)[None]}]
    prune_heads(model, {0: [0, 1]}, calibration=inputs)
    report = last_change(model).refit  # type: ignore[union-attr]
    assert report.held_out is None and report.kept == "output" and report.num_tokens == 40
    assert all(layer.unseen_after is not None for layer in report.layers)
    assert "held out" not in str(last_change(model))


def test_no_walk_misses_a_layer_whose_queries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that prove to be no linear map, and attention without a softmax, in the middle of a model."""
    config = GPT2Config(n_layer=4, n_head=4, n_embd=32, vocab_size=512, n_positions=64, initializer_range=0.2)
    torch.manual_seed(0)
    found = GPT2LMHeadModel(config).eval()
    real_fit = refit_module.fit_layer_queries

    def refuses(model: Any, layer: Any, *args: Any) -> Any:
        if layer.index == 1:
            raise NotLinearError
        return real_fit(model, layer, *args)

    monkeypatch.setattr(refit_module, "fit_layer_queries", refuses)
    with pytest.warns(UserWarning, match="linear"):
        swapped = swap_attention(build("llama", num_hidden_layers=4), {1: "linear"})
    for model in (found, swapped):
        convert_to_gqa(model, 2, method="mean", calibration=many(model))
        report = last_change(model).refit  # type: ignore[union-attr]
        assert [layer.kl_after is None for layer in report.layers] == [False, True, False, False]
        assert all(layer.kl_after <= layer.kl_before for layer in report.layers if layer.kl_after is not None)
