"""Plans, calibration and refits of models whose heads are found by running, against definitions and the table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.any_model import UnseenConfig, UnseenModel
from support.calibrated import CONVERTED, FIXED, batches_for, divergence, lively, logits
from support.refits import plain
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_attnkit import convert_to_gqa, last_change, load_pretrained, plan_gqa, swap_attention
from hf_attnkit.conversion.statistics import Statistics, collect
from hf_attnkit.models.layers import projected_layers


def halves(model: Any) -> int | list[int]:
    """Half of each layer's key/value heads."""
    numbers = [layer.num_key_value_heads // 2 for layer in projected_layers(model)]
    return numbers if len(set(numbers)) > 1 else numbers[0]


@pytest.mark.parametrize("model_type", CONVERTED)
def test_calibration_and_refits_lose_less(model_type: str) -> None:
    """On the calibration's own batches, where each of these is the better fit."""
    model = lively(model_type)
    batches, lost = batches_for(model), {}
    for name, options in {
        "mean": {"method": "mean"},
        "pca": {"calibration": batches, "refit": "none"},
        "output": {"calibration": batches, "refit": plain("output")},
        "full": {"calibration": batches, "refit": plain("full")},
    }.items():
        changed = convert_to_gqa(copy.deepcopy(model), halves(model), **options)
        lost[name] = divergence(changed, model, batches)
    assert lost["pca"] < 0.9 * lost["mean"]
    assert lost["output"] < 0.9 * lost["pca"]
    assert lost["full"] <= lost["output"]
    report = last_change(changed)
    fitted = [layer for layer in report.refit.layers if layer.kl_before is not None]  # type: ignore[union-attr]
    assert all(layer.kl_after <= layer.kl_before for layer in fitted)  # type: ignore[operator]
    # A cap of the scores forbids the fit of queries, and so do keys of another sequence.
    cross = len([layer for layer in projected_layers(model) if layer.is_cross])
    assert len(fitted) == (0 if model_type == "gemma2" else len(projected_layers(model)) - cross)


@pytest.mark.parametrize("model_type", [*CONVERTED, *FIXED, "gpt_oss", "clip"])
def test_as_many_heads_as_before_change_nothing_but_bases(model_type: str) -> None:
    model = lively(model_type)
    if not hasattr(model.config, "num_experts_per_tok") and model.config._attn_implementation == "sdpa":
        model = model.double()
    batches = batches_for(model) if model_type != "clip" else None
    changed = copy.deepcopy(model)
    numbers = [layer.num_key_value_heads for layer in projected_layers(model)]
    convert_to_gqa(changed, numbers, method="pca", calibration=batches, refit="none")
    moved = [not torch.equal(a, b) for a, b in zip(changed.parameters(), model.parameters(), strict=True)]
    assert any(moved)
    report = last_change(changed)
    assert all(abs(layer.key_loss) < 1e-9 and abs(layer.value_loss) < 1e-9 for layer in report.layers)  # type: ignore[union-attr]
    if batches is not None:
        # Maps that undo each other multiply rounding by their condition, here some hundreds.
        tolerance = 1e-11 if model.dtype == torch.float64 else 1e-3
        for inputs in batches:
            torch.testing.assert_close(logits(changed, inputs), logits(model, inputs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("model_type", FIXED)
def test_a_forward_pass_that_takes_one_number_is_refused_before_the_calibration(model_type: str) -> None:
    model = lively(model_type)

    def batches() -> Any:
        raise AssertionError("the calibration was read")
        yield

    with unchanged(model), pytest.raises(ValueError, match="does not run with fewer heads"):
        convert_to_gqa(model, 2, calibration=batches(), refit="none")


def test_gpt2_converted_is_the_attention_computed_by_hand() -> None:
    """Of a layer with the mean of two keys and values each, from the untouched Conv1D, in float64."""
    model = lively("gpt2").double()
    inputs = batches_for(model, 1)[0]
    layer, heads, size = model.transformer.h[0], 4, 8
    seen: list[Tensor] = []
    handle = layer.ln_1.register_forward_hook(lambda _, args, out: seen.append(out))
    logits(model, inputs)
    handle.remove()
    x, mask = seen[0], inputs["attention_mask"].bool()
    made = (x @ layer.attn.c_attn.weight + layer.attn.c_attn.bias).detach()
    query, key, value = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in made.chunk(3, dim=-1))
    key, value = (part.unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1) for part in (key, value))
    visible = mask[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    scores = (query @ key.mT / size**0.5).masked_fill(~visible, -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    want = mixed @ layer.attn.c_proj.weight + layer.attn.c_proj.bias

    convert_to_gqa(model, 2, method="mean")
    got: list[Tensor] = []
    layer.attn.register_forward_hook(lambda _, args, out: got.append(out[0]))
    logits(model, inputs)
    assert layer.attn.c_attn.weight.shape == (32, 64) and layer.attn.split_size == [32, 16, 16]
    torch.testing.assert_close(got[0][mask], want[mask], rtol=0, atol=1e-12)


def test_gpt2_converted_saves_generates_and_is_pruned(tmp_path: Any) -> None:
    from hf_attnkit import prune_heads

    model = convert_to_gqa(lively("gpt2"), 2)
    model.save_pretrained(tmp_path)
    back, ids = load_pretrained(tmp_path).eval(), torch.arange(3, 12)[None]
    assert torch.equal(back(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(back.generate(ids, use_cache=True, **options), back.generate(ids, use_cache=False, **options))
    prune_heads(back, {0: [0, 1], 1: [2, 3]})
    assert back.transformer.h[0].attn.split_size in ([16, 8, 8], 8)
    assert back(ids).logits.isfinite().all()


@pytest.mark.parametrize("model_type", ["gpt2", "bart"])
def test_a_failing_batch_leaves_the_model_as_it_was(model_type: str) -> None:
    model = lively(model_type)
    batches = batches_for(model)
    broken = dict(batches[-1])
    broken["inputs_embeds"] = torch.zeros(*broken.pop("input_ids").shape, 5)  # the model's are wider
    with unchanged(model), pytest.raises(RuntimeError):
        convert_to_gqa(model, halves(model), method="mean", calibration=[*batches, broken], refit="output")
    statistics = collect(model, projected_layers(model), batches)
    plan = plan_gqa(model, halves(model), calibration=batches)
    assert plan._work is not None
    plan._work.batches.append(broken)  # fails in the refit, after the heads are gone
    with unchanged(model), pytest.raises(RuntimeError):
        plan.apply()
    plan._work.batches.pop()
    changed = plan.apply()
    assert divergence(changed, lively(model_type), batches) > 0
    assert statistics.num_tokens == min(
        sum(int(b[name].sum()) for b in batches) for name in batches[0] if name.endswith("attention_mask")
    )


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {}),
        ("gpt2", {"budget": 0.6, "uniform": False}),
        ("mixtral", {"refit": "scale"}),
        ("mixtral", {"grouping": "best"}),
        ("bart", {}),
        ("bart", {"budget": 0.6, "uniform": False}),
    ],
    ids=str,
)
def test_converting_is_applying_a_plan(model_type: str, options: dict[str, Any]) -> None:
    model = lively(model_type)
    batches = batches_for(model)
    number = None if "budget" in options else 1
    one = convert_to_gqa(copy.deepcopy(model), number, calibration=batches, **options)
    with unchanged(model):
        plan = plan_gqa(model, number, calibration=iter(batches), **options)
        assert "predicted" not in str(plan) and len(plan.layers) == len(projected_layers(model))
    assert plan.bytes_after < plan.bytes_before
    assert plan.apply() is model
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert str(plan.report) == str(last_change(model)) == str(last_change(one))
    with pytest.raises(ValueError, match="applied already"):
        plan.apply()


def add_one(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.data[0, 0] += 1


STALE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weights": (add_one, r"parameters of 'transformer.h.1.attn.c_attn' were written"),
    "dtype": (lambda m: m.double(), "had the dtype|was replaced"),
    "converted": (lambda m: convert_to_gqa(m, 2), "num_key_value_heads was 4 and is 2"),
    "swapped": (lambda m: swap_attention(m, "sliding_window", window=2), "ran 'sdpa', and runs"),
    "module": (
        lambda m: setattr(m.transformer.h[0].attn, "c_proj", copy.deepcopy(m.transformer.h[0].attn.c_proj)),
        "the output module was replaced",
    ),
}


@pytest.mark.parametrize("change", STALE)
def test_a_stale_plan_is_refused(change: str) -> None:
    model = lively("gpt2")
    plan = plan_gqa(model, 1)
    act, message = STALE[change]
    act(model)
    with unchanged(model), pytest.raises(ValueError, match=f"no longer what the plan was made for: .*({message})"):
        plan.apply()


def test_statistics_of_two_sequences_are_saved(tmp_path: Any) -> None:
    """A decoder's cross-attention has queries of one input and keys of another: a second moment for each."""
    model = lively("bart")
    layers, batches = projected_layers(model), batches_for(model)
    statistics = collect(model, layers, batches)
    cross = [layer.index for layer in layers if layer.is_cross]
    assert sorted(statistics.others) == [(index, "query") for index in cross]
    seen: list[Tensor] = []
    handle = layers[cross[0]].module.q_proj.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    for inputs in batches:
        logits(model, inputs)
    handle.remove()
    x = torch.cat([t[b["decoder_attention_mask"].bool()] for t, b in zip(seen, batches, strict=True)]).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    torch.testing.assert_close(statistics.others[cross[0], "query"], x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    statistics.save(tmp_path / "moments.safetensors")
    again = Statistics.load(tmp_path / "moments.safetensors")
    assert again.others.keys() == statistics.others.keys()
    plans = [plan_gqa(model, 2, calibration=each, refit="none") for each in (statistics, again)]
    assert plans[0].layers[-1].key_loss == pytest.approx(plans[1].layers[-1].key_loss, rel=1e-4)
    without = Statistics(statistics.second_moments, statistics.num_tokens)
    with unchanged(model), pytest.raises(ValueError, match="no second moment of the query projection's input"):
        plan_gqa(model, 2, calibration=without)


def test_predicted_losses_of_cross_attention_are_means_over_tokens() -> None:
    """Of values that are averaged, from activations: the share of the outputs' energy, tokens drawn as they come."""
    model = lively("bart").double()
    layers, batches = projected_layers(model), batches_for(model)
    layer = next(each for each in layers if each.is_cross)
    plan = plan_gqa(model, 2, method="mean", calibration=batches, refit="none")
    seen: list[Tensor] = []
    handle = layer.value.register_forward_hook(lambda _, args, out: seen.append(out))  # type: ignore[arg-type]
    for inputs in batches:
        logits(model, inputs)
    handle.remove()
    value = torch.cat([t[b["attention_mask"].bool()] for t, b in zip(seen, batches, strict=True)]).unflatten(1, (4, 8))
    value = value - value.mean(0)  # the output has a bias, which takes constants
    merged = value.unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1)
    columns = layer.output_weight.unflatten(1, (4, 8))
    lost = torch.einsum("mhd,thd->thm", columns, value - merged).square().sum()
    total = torch.einsum("mhd,thd->thm", columns, value).square().sum()
    assert plan.layers[layer.index].value_loss == pytest.approx(float(lost / total), rel=1e-9)


def test_an_empty_calibration_and_bad_words() -> None:
    model = lively("gpt2")
    with unchanged(model):
        with pytest.raises(ValueError, match="batches"):
            plan_gqa(model, 2, calibration=[])
        with pytest.raises(ValueError, match="needs calibration batches"):
            plan_gqa(model, 2, refit="output")
        with pytest.raises(ValueError, match="not both"):
            plan_gqa(model, 2, budget=0.5)
        with pytest.raises(ValueError, match="too few"):
            plan_gqa(model, 1, calibration=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}], refit="none")


def test_heads_keep_their_order_where_something_else_has_one_for_each() -> None:
    model = lively("gpt_oss")
    with unchanged(model), pytest.raises(ValueError, match="grouping='best' puts heads in another order, which sinks"):
        convert_to_gqa(model, 1, grouping="best")
    ids = torch.arange(60).view(3, 20)
    assert plan_gqa(model, 1, method="pca", calibration=[{"input_ids": ids}]).grouping == "adjacent"


def test_a_gate_of_each_component_forbids_another_basis_of_values() -> None:
    model = lively("qwen3_next")
    with unchanged(model), pytest.raises(ValueError, match="between values and output projection"):
        convert_to_gqa(model, 1, method="pca", key_method="mean")
    convert_to_gqa(model, 1, calibration=batches_for(model))
    assert last_change(model).method == "mean"  # type: ignore[union-attr]


def test_modules_are_hooked_for_the_block_only() -> None:
    model = lively("gpt2")
    convert_to_gqa(model, 2, calibration=batches_for(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Module))


class TwoSizesAttention(nn.Module):
    """Heads of 8 components for queries and keys, of 5 for values; keys and values of other tokens where given."""

    is_causal = False

    def __init__(self, config: UnseenConfig) -> None:
        super().__init__()
        self.config, self.heads, self.num_key_value_groups = config, config.heads, 1
        self.ask, self.tell = nn.Linear(config.width, 8 * config.heads), nn.Linear(config.width, 8 * config.heads)
        self.carry, self.back = nn.Linear(config.width, 5 * config.heads), nn.Linear(5 * config.heads, config.width)

    def forward(self, x: Tensor) -> Tensor:
        def split(made: Tensor, size: int) -> Tensor:
            return made.unflatten(-1, (-1, size)).transpose(1, 2)

        attend = AttentionInterface().get_interface(self.config._attn_implementation, sdpa_attention_forward)
        value = split(self.carry(x.flip(1)), 5)
        out, _ = attend(self, split(self.ask(x), 8), split(self.tell(x), 8), value, None, scaling=8**-0.5)
        return self.back(out.flatten(2))


def test_values_have_a_size_and_an_input_of_their_own() -> None:
    torch.manual_seed(0)
    model = UnseenModel(UnseenConfig())
    model.parts = nn.ModuleList(TwoSizesAttention(model.config) for _ in range(2))
    model = model.double().eval()
    layers, batches = projected_layers(model), batches_for(model)
    assert {(layer.head_dim, layer.value_head_dim, layer.other_inputs) for layer in layers} == {
        (8, 5, frozenset({"value"}))
    }
    same = convert_to_gqa(copy.deepcopy(model), 4, method="pca", calibration=batches, refit="none")
    for inputs in batches:
        torch.testing.assert_close(same(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-11)
    lost = {}
    for name, options in {"mean": {"method": "mean"}, "pca": {"calibration": batches, "refit": "none"},
                          "full": {"calibration": batches, "refit": plain("full")}}.items():  # fmt: skip
        changed = convert_to_gqa(copy.deepcopy(model), 2, **options)
        assert changed.parts[0].carry.out_features == 10 and changed.parts[0].tell.out_features == 16
        lost[name] = float(sum((changed(**b)[0] - model(**b)[0]).square().sum() for b in batches))
    assert lost["full"] < 0.9 * lost["pca"] < 0.8 * lost["mean"]
    plan = plan_gqa(model, 2, calibration=batches)
    assert plan.bytes_before == 2 * 4 * (8 + 5) * 8 and plan.bytes_after == plan.bytes_before // 2


def test_modules_that_are_called_several_times() -> None:
    """ALBERT: one layer for all calls, whose outputs are fitted over all of them."""
    model = lively("albert")
    batches = batches_for(model)
    lost = {}
    for name, options in {"mean": {"method": "mean"}, "pca": {"calibration": batches, "refit": "none"},
                          "full": {"calibration": batches, "refit": plain("full")}}.items():  # fmt: skip
        changed = convert_to_gqa(copy.deepcopy(model), 2, **options)
        lost[name] = divergence(changed, model, batches)
    assert lost["full"] < lost["pca"] < lost["mean"]
    report = last_change(changed)
    (layer,) = report.refit.layers  # type: ignore[union-attr]
    assert layer.kl_before is None and layer.error_after < layer.error_before
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    assert report.refit.num_tokens == report.num_tokens == 2 * tokens  # type: ignore[union-attr]
