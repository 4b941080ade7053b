"""Removed heads: the model equals one with those heads zeroed, and it saves, reloads, generates and trains."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.models import CLASSES, DECODERS, EVERY_HEAD, aligned, batch, build, outputs
from support.pruned import GROUPED, UNEVEN, assert_same, numbers, zeroed
from support.subprocesses import run_python
from transformers import DynamicCache

from hf_attnkit import (
    convert_to_gqa,
    head_importance,
    load_pretrained,
    prune_heads,
    restore_attention,
    select_heads,
    swap_attention,
)
from hf_attnkit.models.layers import projected_layers

FAMILIES = ("bert", *DECODERS)


every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD, ids=lambda x: x)
def test_equals_zeroing(family: str, head: str) -> None:
    model = build(family, head)
    reference = zeroed(model, UNEVEN)
    assert prune_heads(model, UNEVEN) is model
    assert numbers(model) == [(5, 5), (3, 3)]
    assert_same(model, reference, batch(model))


@pytest.mark.parametrize("selection", [GROUPED, {0: [0, 1, 2, 3]}, {1: [1, 2, 3, 4, 6, 7]}], ids=str)
@every_family
def test_equals_zeroing_with_groups(family: str, selection: dict[int, list[int]]) -> None:
    model = convert_to_gqa(build(family), 2)
    reference = zeroed(model, selection)
    prune_heads(model, selection)
    assert_same(model, reference, batch(model))
    for layer in projected_layers(model):
        removed = len(selection.get(layer.index, []))
        assert layer.num_heads == 8 - removed
        assert layer.module.num_key_value_groups == layer.num_heads // layer.num_key_value_heads


def test_whole_groups_take_their_keys_and_values_along() -> None:
    model = prune_heads(build("llama", "base", 8, 2), GROUPED)
    assert numbers(model) == [(4, 1), (4, 2)]
    first, second = (layer.self_attn for layer in model.layers)
    assert (first.k_proj.out_features, first.v_proj.weight.shape[0], first.k_proj.bias.shape[0]) == (8, 8, 8)
    assert (second.k_proj.out_features, second.num_key_value_groups) == (16, 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_family
def test_stock_attention_of_either_kind(family: str, implementation: str) -> None:
    model = build(family)
    model.set_attn_implementation(implementation)
    inputs = batch(model, (9, 9))
    expected, exact = outputs(zeroed(model, UNEVEN), inputs), outputs(zeroed(model, UNEVEN).double(), inputs)
    assert_as_accurate(
        outputs(prune_heads(model, UNEVEN), inputs).detach(), expected.detach(), exact.detach(), terms=96
    )


@every_family
def test_order_and_kind_of_the_selection_do_not_matter(family: str) -> None:
    one, other = build(family), build(family)
    prune_heads(one, {1: [5, 0], 0: [2]})
    prune_heads(other, {0: {2}, 1: (head for head in (0, 5))})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.config.to_dict() == other.config.to_dict()


@every_family
def test_pruning_twice_counts_heads_anew(family: str) -> None:
    """Without 0 and 1, head 2 is the new head 0."""
    twice, once = build(family), build(family)
    prune_heads(prune_heads(twice, {0: [0, 1]}), {0: [0, 5], 1: [3]})
    prune_heads(once, {0: [0, 1, 2, 7], 1: [3]})
    assert numbers(twice) == numbers(once) == [(4, 4), (7, 7)]
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True))
    assert twice.config.to_dict() == once.config.to_dict()


@every_family
def test_down_to_one_head(family: str) -> None:
    model = build(family)
    everything_else = {0: list(range(1, 8)), 1: list(range(7))}
    reference = zeroed(model, everything_else)
    assert_same(prune_heads(model, everything_else), reference, batch(model))


@every_family
def test_selection_from_scores_is_accepted(family: str) -> None:
    model = convert_to_gqa(build(family), 4)
    selection = select_heads(head_importance(model, method="magnitude"), fraction=0.5, num_key_value_heads=4)
    prune_heads(model, selection)
    assert sum(heads for heads, _ in numbers(model)) == 8
    assert outputs(model, batch(model)).isfinite().all()


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD, ids=lambda x: x)
def test_reloads_bit_equal(family: str, head: str, tmp_path: Path) -> None:
    model = prune_heads(build(family, head), UNEVEN)
    inputs = batch(model)
    model.save_pretrained(tmp_path / "one")
    again = aligned(load_pretrained(tmp_path / "one"))
    assert type(again) is CLASSES[family][head]
    assert numbers(again) == numbers(model)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    prune_heads(again, {0: [0]}).save_pretrained(tmp_path / "two")
    third = aligned(load_pretrained(tmp_path / "two"))
    assert torch.equal(outputs(third, inputs), outputs(again, inputs))


@every_family
def test_grouped_and_uneven_reloads_bit_equal(family: str, tmp_path: Path) -> None:
    model = prune_heads(convert_to_gqa(build(family), 2), GROUPED)
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert numbers(again) == numbers(model) == [(4, 1), (4, 2)]
    assert torch.equal(outputs(again, batch(model)), outputs(model, batch(model)))


@every_family
def test_what_is_saved(family: str, tmp_path: Path) -> None:
    """The key of docs/checkpoints.md, and no other fields than the stock config has."""
    prune_heads(build(family), UNEVEN).save_pretrained(tmp_path / "uneven")
    build(family).save_pretrained(tmp_path / "stock")
    saved, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("uneven", "stock"))
    assert [layer["heads"] for layer in saved["hf_attnkit"]["heads"]["layers"].values()] == [[5, 5], [3, 3]]
    assert saved.keys() - stock.keys() == {"hf_attnkit", "attn_implementation"}
    assert saved["attn_implementation"] == "hf_attnkit"  # by which plain Transformers refuses it
    assert all(saved[key] == value for key, value in stock.items())


@every_family
def test_plain_from_pretrained_never_loads_uneven_heads_wrongly(family: str, tmp_path: Path) -> None:
    model = prune_heads(build(family), UNEVEN)
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.slow
def test_uniform_decoders_load_without_this_package(tmp_path: Path) -> None:
    """Mistral with any number of heads; Llama where it divides the hidden size."""
    for family, heads, kv_heads, selection in (
        ("llama", 8, 8, [0, 3, 5, 6]),
        ("llama", 8, 2, [0, 1, 2, 3]),
        ("mistral", 8, 8, [1, 2, 4]),
        ("mistral", 8, 4, [2, 3]),
    ):
        model = prune_heads(build(family, "causal", heads, kv_heads), {0: selection, 1: selection})
        assert "per_layer_config" not in model.config.to_diff_dict()
        inputs = batch(model)
        path = tmp_path / f"{family}{kv_heads}"
        model.save_pretrained(path)
        torch.save((inputs, outputs(model, inputs).detach()), path / "expected.pt")
    run_python(
        """
        import copy, pathlib, sys, torch
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        paths = sorted(pathlib.Path(sys.argv[1]).iterdir())
        assert len(paths) == 4
        for path in paths:
            inputs, expected = torch.load(path / "expected.pt")
            model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            logits = copy.deepcopy(model.eval())(**inputs).logits  # in aligned memory
            real = inputs["attention_mask"].bool()
            assert torch.equal(logits[real], expected[real]), path
        assert "hf_attnkit" not in sys.modules
        """,
        tmp_path,
    )


def test_uniform_llama_whose_heads_do_not_divide_reloads(tmp_path: Path) -> None:
    """Five heads do not divide 64: Llama's plain fields cannot say it, so the layers do."""
    model = prune_heads(build("llama", "causal"), {0: [0, 1, 2], 1: [0, 1, 2]})
    model.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert numbers(again) == [(5, 5), (5, 5)]
    assert torch.equal(outputs(again, batch(model)), outputs(model, batch(model)))


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_generates_with_a_cache_of_uneven_layers(family: str) -> None:
    model = prune_heads(convert_to_gqa(build(family, "causal"), 4), {0: [0, 1], 1: [1, 2, 4, 7]})
    inputs = batch(model, (11, 6))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[1] for layer in cache.layers] == [3, 4]
    with torch.no_grad():
        for _ in range(8):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, chosen], dim=1), torch.cat([mask, torch.ones_like(chosen)], dim=1)
    assert torch.equal(generated, ids)


@every_family
def test_conversion_after_pruning(family: str) -> None:
    model = prune_heads(build(family), {0: [0, 1, 2, 3], 1: [6, 7]})
    convert_to_gqa(model, 2)
    assert numbers(model) == [(4, 2), (6, 2)]
    other = build(family)
    keys = [projected_layers(other)[0].key.weight[start : start + 8] for start in (32, 40)]
    actual = projected_layers(model)[0].key.weight[:8]
    # Heads 4 and 5 of before are the first group now; a mean of two rounds once.
    assert ((keys[0] + keys[1]) / 2 - actual).abs().max() <= torch.finfo(torch.float32).eps
    assert outputs(model, batch(model)).isfinite().all()


@every_family
def test_swap_after_and_before_pruning(family: str) -> None:
    stock = prune_heads(convert_to_gqa(build(family), 2), GROUPED)
    inputs = batch(stock)
    for name in ("mha", "gqa", "flash"):
        assert_same(swap_attention(copy.deepcopy(stock), name), stock, inputs)
    before = prune_heads(convert_to_gqa(swap_attention(build(family), "gqa"), 2), GROUPED)
    assert_same(before, stock, inputs)
    restore_attention(before)
    assert torch.equal(outputs(before, inputs), outputs(stock, inputs))
    mqa = prune_heads(swap_attention(copy.deepcopy(stock), "mqa", layers=[0]), {0: [0]})
    assert_same(mqa, prune_heads(copy.deepcopy(stock), {0: [0]}), inputs)


@every_family
def test_trains_after_pruning(family: str, tmp_path: Path) -> None:
    model = prune_heads(build(family, "sequence"), UNEVEN).train()
    inputs = batch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
    for layer in projected_layers(model):
        assert all(p.weight.grad.abs().max() > 0 for p in (layer.query, layer.key, layer.value, layer.output))
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(outputs(aligned(load_pretrained(tmp_path)), inputs), outputs(model, inputs))


@every_family
def test_dtype_flags_and_hooks_are_kept(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    layer = projected_layers(model)[0]
    layer.output.weight.requires_grad = False
    called = []
    layer.query.register_forward_hook(lambda module, args, output: called.append(output.shape[-1]))
    kept = layer.query.weight[8:16].clone()
    prune_heads(model, {0: [0]})
    called.clear()  # the proof runs the model
    assert torch.equal(layer.query.weight[:8], kept) and layer.query.weight.dtype == torch.bfloat16
    assert not layer.output.weight.requires_grad and layer.query.weight.requires_grad
    outputs(model, batch(model))
    assert called == [56]


def test_adapters_on_a_pruned_model_have_an_effect_and_save(tmp_path: Path) -> None:
    """PEFT once saved original shapes for pruned layers, silently without effect."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = prune_heads(build("llama", "causal"), UNEVEN)
    inputs = batch(model)
    plain = outputs(model, inputs)
    base = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    expected = outputs(tuned, inputs)
    assert (expected - plain).abs().max() > 1e-2
    tuned.save_pretrained(tmp_path)
    again = aligned(PeftModel.from_pretrained(base, tmp_path))
    assert torch.equal(outputs(again, inputs), expected)
    merged = tuned.merge_and_unload()
    assert numbers(prune_heads(merged, {1: [0]})) == [(5, 5), (2, 2)]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapters_are_trained_merged_and_saved_in_the_smaller_shapes(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = prune_heads(build(family, "sequence"), {0: range(8), 1: UNEVEN[1]})
    inputs = batch(model)
    plain = outputs(model, inputs).detach()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[family]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=names)).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):  # the first step leaves one factor of the product at zero
        tuned(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = outputs(tuned.eval(), inputs).detach()
    assert (expected - plain).abs().max() > 1e-2
    merged = tuned.merge_and_unload()
    # A product of rank 2 is added to the weights instead of to the outputs: a few roundings.
    exact = outputs(copy.deepcopy(merged).double(), inputs).detach()
    assert_as_accurate(outputs(merged, inputs).detach(), expected, exact, terms=96)
    merged.save_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert {name: parameter.shape for name, parameter in again.named_parameters()} == shapes
    assert numbers(again) == [(1, 1), (3, 3)] and [layer.is_empty for layer in projected_layers(again)] == [True, False]
    assert torch.equal(outputs(again, inputs), outputs(merged, inputs))


@every_family
def test_an_optimizer_made_before_changes_nothing(family: str) -> None:
    """It holds the old parameters of what was cut: so nothing stale ever reaches the model."""
    model = build(family, "sequence").train()
    inputs = batch(model)
    optimizer = torch.optim.AdamW([p for layer in projected_layers(model) for p in layer.module.parameters()], lr=0.1)
    inputs["labels"] = torch.tensor([0, 1, 1])
    model(**inputs).loss.backward()
    optimizer.step()
    prune_heads(model, UNEVEN)
    model(**inputs).loss.backward()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "o_proj.bias" not in name}
    optimizer.step()
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in projected_layers(model):
        assert held.isdisjoint(id(p) for part in (layer.query, layer.key, layer.value) for p in part.parameters())
        assert id(layer.output.weight) not in held


@every_family
def test_gradient_checkpointing(family: str) -> None:
    model = prune_heads(build(family, "sequence"), {0: range(8), 1: UNEVEN[1]})
    inputs = batch(model)
    gradients = []
    for checkpointing in (False, True):
        other = copy.deepcopy(model).train()
        for module in other.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            other.gradient_checkpointing_enable()
        other(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append([p.grad for p in other.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
