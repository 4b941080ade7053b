"""Mean-pooling against its definition, and what a converted model is: in memory, on disk, in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import EPS64, assert_as_accurate
from support.every_type import small_model
from support.models import CLASSES, DECODERS, aligned, batch, build, outputs
from support.pooling import pooled
from support.pruned import numbers
from support.subprocesses import run_python
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

from hf_attnkit import convert_to_gqa, convert_to_mqa, load_pretrained, swap_attention
from hf_attnkit.models.layers import projected_layers

FAMILIES = ("bert", *DECODERS)


every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "number"),
    [("bert", 8, None, 2), ("bert", 8, None, 1), ("llama", 8, 8, 4), ("llama", 8, 4, 2), ("mistral", 8, 8, 1)],
)
def test_definition(family: str, heads: int, kv_heads: int | None, number: int) -> None:
    model = build(family, "base", heads, kv_heads).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert convert_to_gqa(model, number) is model
    changed = 0
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".k_proj.", ".v_proj.", "self.key.", "self.value.")):
            expected = pooled(before[name], number)
            # A mean of at most 8 numbers, in any order: fewer than 8 roundings.
            bound = 8 * EPS64 * before[name].abs().max()
            assert parameter.shape == expected.shape and (parameter - expected).abs().max() <= bound
            changed += 1
        else:
            assert torch.equal(parameter, before[name]), name
    assert changed == (4 if family == "mistral" else 8)


@every_family
@pytest.mark.parametrize("number", [1, 2, 4])
def test_equals_a_model_with_repeated_heads(family: str, number: int) -> None:
    """Multi-head attention in which each key/value head is replaced by its group's mean."""
    model = build(family)
    inputs = batch(model)
    repeated = copy.deepcopy(model)
    with torch.no_grad():
        for layer in projected_layers(repeated):
            for projection in (layer.key, layer.value):
                for p in projection.parameters():
                    heads = pooled(p, number).unflatten(0, (number, 8))
                    p.copy_(heads.repeat_interleave(8 // number, dim=0).flatten(0, 1))
    exact = outputs(copy.deepcopy(repeated).double(), inputs).detach()
    converted = outputs(convert_to_gqa(model, number), inputs).detach()
    assert_as_accurate(converted, outputs(repeated, inputs).detach(), exact, terms=96)


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "expected"),
    [
        ("llama", 8, 8, 2),
        ("llama", 4, 4, 1),
        ("llama", 16, 16, 4),
        ("llama", 16, 8, 4),
        ("mistral", 8, 4, 2),
        ("llama", 2, 2, 1),
        ("bert", 8, None, 2),
    ],
)
def test_default_is_at_most_a_quarter(family: str, heads: int, kv_heads: int | None, expected: int) -> None:
    model = convert_to_gqa(build(family, "base", heads, kv_heads))
    assert numbers(model) == [(heads, expected)] * 2


def test_default_where_a_quarter_does_not_divide() -> None:
    """12 heads over 12: a quarter is 3. 10 over 10: a quarter is 2.5, the largest divisor up to it is 2."""
    for heads, expected in ((12, 3), (10, 2)):
        model = build("mistral", "base", heads, heads, hidden_size=heads * 8)
        assert convert_to_gqa(model).config.num_key_value_heads == expected


def test_default_refused_where_nothing_is_left_to_do() -> None:
    with pytest.raises(ValueError, match=r"already have at most a quarter .*8 query over 2.*one of \[1\]"):
        convert_to_gqa(build("llama", "base", 8, 2))


@every_family
def test_mqa_is_one_head(family: str) -> None:
    model, same = build(family), build(family)
    assert convert_to_mqa(model) is model
    convert_to_gqa(same, 1)
    assert numbers(model) == [(8, 1)] * 2
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)
    swap_attention(model, "mqa")  # accepted: exactly one head
    assert outputs(model, batch(model)).isfinite().all()


@every_family
def test_weights_attributes_and_config_agree(family: str) -> None:
    model = convert_to_gqa(build(family), 2)
    assert numbers(model) == [(8, 2)] * 2 and model.config.num_attention_heads == 8
    assert family == "bert" or model.config.num_key_value_heads == 2
    for layer in projected_layers(model):
        assert layer.module.num_key_value_groups == 4
        for linear, features in ((layer.query, 64), (layer.key, 16), (layer.value, 16)):
            assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape) == (features, 64)
            assert linear.bias is None or linear.bias.shape == (features,)
    assert f"num_key_value_heads={2}" not in repr(model) and "out_features=16" in repr(model)


def test_step_by_step_equals_at_once() -> None:
    """The mean of means of equal groups is the mean: 8 to 4 to 1 is 8 to 1."""
    model = convert_to_gqa(convert_to_gqa(build("llama").double(), 4), 1)
    for one, other in zip(model.parameters(), convert_to_gqa(build("llama").double(), 1).parameters(), strict=True):
        assert (one - other).abs().max() <= 8 * EPS64 * 2  # largest weight below 2: see test_definition
    assert max(p.abs().max() for p in model.layers.parameters()) < 2


@every_family
def test_dtype_training_flags_and_hooks_are_kept(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    layer = projected_layers(model)[0]
    exact = pooled(layer.key.weight.double(), 2)
    layer.key.weight.requires_grad = False
    called = []
    layer.value.register_forward_hook(lambda module, args, output: called.append(output.shape[-1]))
    modules = [id(m) for m in model.modules()]
    convert_to_gqa(model, 2)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    # Pooled in float32 and rounded once: off by half an eps of bfloat16 at most, eps/2 relative.
    half = torch.finfo(torch.bfloat16).eps / 2
    assert ((layer.key.weight.double() - exact).abs() <= exact.abs() * half * 1.01 + 1e-7).all()
    assert not layer.key.weight.requires_grad
    assert layer.value.weight.requires_grad and layer.query.weight.requires_grad
    assert [id(m) for m in model.modules()] == modules
    called.clear()  # the proof has run the model
    outputs(model, batch(model))
    assert called == [16]


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_cache_shrinks(family: str) -> None:
    model = convert_to_gqa(build(family, "causal"), 2)
    cache = DynamicCache(config=model.config)
    model(**batch(model, (9, 9)), past_key_values=cache, use_cache=True)
    assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 9, 8)] * 2


@every_family
def test_trains_saves_and_reloads(family: str, tmp_path: Path) -> None:
    model = convert_to_gqa(build(family, "sequence"), 2).train()
    inputs = batch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for layer in projected_layers(model) for p in layer.key.parameters()]
    model(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
    for layer in projected_layers(model):
        assert all(projection.weight.grad.abs().max() > 0 for projection in (layer.key, layer.value, layer.query))
    optimizer.step()
    after = [p for layer in projected_layers(model) for p in layer.key.parameters()]
    assert not torch.equal(before[0], after[0])
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(outputs(aligned(load_pretrained(tmp_path)), inputs), outputs(model, inputs))


@pytest.mark.slow
def test_families_with_key_value_heads_load_without_this_package(tmp_path: Path) -> None:
    """By the mean, and by pca with queries and outputs refitted."""
    for family in (*DECODERS, "qwen2", "phi3", "glm", "stablelm"):
        for number in (2, 1):
            model = build(family, "causal")
            inputs = batch(model)
            options = {"method": "pca", "calibration": [batch(model, seed=s) for s in range(6)]} if number == 1 else {}
            convert_to_gqa(model, number, **options)
            path = tmp_path / f"{family}{number}"
            model.save_pretrained(path)
            torch.save((inputs, outputs(model, inputs).detach()), path / "expected.pt")
    run_python(
        """
        import copy, pathlib, sys, torch
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        paths = sorted(pathlib.Path(sys.argv[1]).iterdir())
        assert len(paths) == 12
        for path in paths:
            inputs, expected = torch.load(path / "expected.pt")
            model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            assert model.config.num_key_value_heads == int(path.name[-1])
            logits = copy.deepcopy(model.eval())(**inputs).logits  # in aligned memory
            real = inputs["attention_mask"].bool()
            assert torch.equal(logits[real], expected[real])
        assert "hf_attnkit" not in sys.modules
        """,
        tmp_path,
    )


@pytest.mark.parametrize("head", list(CLASSES["bert"]))
def test_bert_reloads_with_every_head_type(head: str, tmp_path: Path) -> None:
    model = convert_to_gqa(build("bert", head), 2)
    inputs: dict[str, Any] = batch(model)
    if head == "choice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        type(model).from_pretrained(tmp_path)
    again = aligned(load_pretrained(tmp_path))
    assert type(again) is CLASSES["bert"][head]
    first, second = model(**inputs), again(**inputs)
    assert all(torch.equal(second[key], first[key]) for key in first if isinstance(first[key], Tensor))


@every_family
def test_reload_with_another_class_or_dtype(family: str, tmp_path: Path) -> None:
    """A classifier's checkpoint as the base model, and in bfloat16: the converted weights come along."""
    model = convert_to_gqa(build(family, "sequence"), 2)
    model.save_pretrained(tmp_path)
    base = aligned(load_pretrained(tmp_path, AutoModel))
    inputs = batch(model)
    assert type(base) is CLASSES[family]["base"]
    assert torch.equal(outputs(base, inputs), outputs(model.base_model, inputs))
    half = load_pretrained(tmp_path, dtype=torch.bfloat16)
    for loaded, original in zip(half.parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, original.to(torch.bfloat16))


def test_loading_an_unchanged_checkpoint_is_from_pretrained(tmp_path: Path) -> None:
    model = build("llama", "causal", 8, 2)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config.to_dict() == type(model).from_pretrained(tmp_path).config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_grouped_bert_is_refused_under_eager(tmp_path: Path) -> None:
    convert_to_gqa(build("bert"), 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"eager attention has no grouped heads for 'bert'.*sdpa"):
        load_pretrained(tmp_path, attn_implementation="eager")


def test_one_key_value_head_is_broadcast_under_eager(tmp_path: Path) -> None:
    model = convert_to_gqa(build("bert"), 1)
    model.save_pretrained(tmp_path)
    eager = load_pretrained(tmp_path, attn_implementation="eager").eval()
    exact = outputs(copy.deepcopy(model).double(), batch(model)).detach()
    assert_as_accurate(outputs(eager, batch(model)).detach(), outputs(model, batch(model)).detach(), exact, terms=96)


@pytest.mark.parametrize("model_type", ["gpt2", "bart", "clip", "albert"])
def test_eager_attention_that_groups_no_heads_is_named(model_type: str) -> None:
    """Of models found by running too; where it does group them (Llama), and for one head, it is converted."""
    model = small_model(model_type)
    model.set_attn_implementation("eager")
    with unchanged(model), pytest.raises(ValueError, match=r"eager attention has no grouped heads for .*sdpa"):
        convert_to_gqa(model, 2)
    convert_to_gqa(model, 1)
    grouped = build("llama")
    grouped.set_attn_implementation("eager")
    convert_to_gqa(grouped, 4)


def test_converted_after_a_swap_keeps_the_swap() -> None:
    model: PreTrainedModel = convert_to_gqa(swap_attention(build("bert"), "mha"), 2)
    other = convert_to_gqa(build("bert"), 2)
    inputs = batch(model)
    exact = outputs(copy.deepcopy(other).double(), inputs).detach()
    assert_as_accurate(outputs(model, inputs).detach(), outputs(other, inputs).detach(), exact, terms=96)
    assert isinstance(model.encoder.layer[0].attention.self.key, nn.Linear)
    assert model.config._attn_implementation == "hf_attnkit"
