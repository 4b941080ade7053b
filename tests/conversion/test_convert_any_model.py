"""`convert_to_gqa` of models that no table knows: as the model of full size whose heads repeat the merged ones."""

from __future__ import annotations

import copy

import pytest
import torch
from support.any_model import any_model
from support.every_type import small_model
from support.unchanged import unchanged
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GptOssConfig, GptOssForCausalLM

from hf_attnkit import convert_to_gqa, last_change, load_pretrained, plan_gqa
from hf_attnkit.models.discovery import discover, run_outputs


def assert_same(a: nn.Module, b: nn.Module, inputs: dict, tolerance: float) -> None:
    with torch.no_grad():
        for x, y in zip(run_outputs(a, inputs), run_outputs(b, inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * (1 + float(y.abs().max())))


def repeat_merged(linear: nn.Linear, heads: int, groups: int, method: str) -> None:
    """Give a projection's heads their group's mean, or first, each repeated."""
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            grouped = parameter.data.unflatten(0, (groups, heads // groups, -1))
            merged = grouped.mean(1, keepdim=True) if method == "mean" else grouped[:, :1]
            parameter.data = merged.expand_as(grouped).flatten(0, 2).contiguous()


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("model_type", ["bart", "clip", "whisper", "mixtral", "gemma2", "qwen3_moe"])
def test_equals_repeated_heads(model_type: str, method: str) -> None:
    model = small_model(model_type)
    found = discover(model)
    if not hasattr(model.config, "num_experts_per_tok") and model.config._attn_implementation == "sdpa":
        model = model.double()
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-5
    repeated = copy.deepcopy(model)
    for attention in found.attentions:
        module = repeated.get_submodule(attention.path)
        for name in ("k_proj", "v_proj"):
            repeat_merged(getattr(module, name), attention.num_key_value_heads, 1, method)
    inputs = discover(repeated).inputs
    assert convert_to_gqa(model, 1, method=method) is model
    assert_same(model, repeated, inputs, tolerance)
    assert all(each.num_key_value_heads == 1 for each in discover(model).attentions)
    report = last_change(model)
    assert report is not None and all(groups == 1 for _, groups in report.heads_after)


def test_key_and_value_in_one_matrix() -> None:
    """The class that nobody has seen: value rows first, a gate for each query head."""
    model = any_model("never seen").double()
    repeated = copy.deepcopy(model)
    for part in repeated.parts:
        for parameter in (part.tell.weight, part.tell.bias):
            grouped = parameter.data.unflatten(0, (2, 2, -1))
            parameter.data = grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 2).contiguous()
    convert_to_gqa(model, 1)
    assert model.parts[0].tell.out_features == 16
    assert_same(model, repeated, {"input_ids": torch.arange(10).view(2, 5)}, 1e-11)


@pytest.mark.parametrize("method", ["procrustes", "pca"])
def test_heads_in_another_basis_lose_less_than_first(method: str) -> None:
    """Of heads that differ by a change of basis alone nothing is lost, which no method without a basis achieves."""
    model = small_model("whisper")
    found = discover(model)
    for attention in found.attentions:
        module, size = attention.module, attention.value_head_dim
        rows = module.v_proj.weight.data.unflatten(0, (attention.num_heads, size))
        turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]
        for head in range(1, attention.num_heads):
            rows[head] = turn @ rows[head - 1]
        if module.v_proj.bias is not None:
            module.v_proj.bias.data.zero_()
    want = run_outputs(model, found.inputs)
    with torch.no_grad():
        off = {}
        for name in (method, "first"):
            got = run_outputs(convert_to_gqa(copy.deepcopy(model), 1, method=name, key_method="first"), found.inputs)
            values = run_outputs(convert_to_gqa(copy.deepcopy(model), 1, method="first"), found.inputs)
            off[name] = float((got[0] - want[0]).abs().mean())
            del values
    report = last_change(convert_to_gqa(copy.deepcopy(model), 1, method=method, key_method="first"))
    assert all(layer.value_loss < 1e-9 for layer in report.layers)  # type: ignore[union-attr]
    assert off[method] < off["first"]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gpt_neox", "does not run with fewer heads"),
        ("deepseek_v3", "latent attention|make them"),
        ("olmo2", "no rows of their own"),
        ("deberta-v2", "never calls Transformers' attention interface"),
    ],
)
def test_what_cannot_be_merged_is_refused(model_type: str, message: str) -> None:
    model = small_model(model_type)
    with unchanged(model), pytest.raises(ValueError, match=message):
        convert_to_gqa(model, 1)


def test_norms_with_weights_per_head_are_named() -> None:
    torch.manual_seed(0)
    config = CohereConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=4, use_qk_norm=True, eos_token_id=2)  # fmt: skip
    model = CohereForCausalLM(config).eval()
    with unchanged(model), pytest.raises(ValueError, match=r"k_norm\.weight has something for each of them"):
        convert_to_gqa(model, 1)
    with unchanged(model), pytest.raises(ValueError, match=r"its key heads cannot be merged: k_norm\.weight"):
        plan_gqa(model, 1)


def test_different_numbers_are_saved_by_path(tmp_path: object) -> None:
    model = small_model("mixtral")
    convert_to_gqa(model, [1, 2])
    model.save_pretrained(tmp_path)
    back = load_pretrained(tmp_path).eval()
    inputs = discover(model).inputs
    with torch.no_grad():
        assert all(map(torch.equal, run_outputs(back, inputs), run_outputs(model, inputs)))


@pytest.mark.parametrize("options", [{}, {"grouping": "best"}, {"method": "pca"}], ids=str)
def test_heads_that_never_meet_the_interface_have_one_reason(options: dict) -> None:
    model = small_model("deberta-v2")
    with unchanged(model), pytest.raises(ValueError, match=r"cannot be merged, by any method.*removed \(prune_heads\)"):
        convert_to_gqa(model, 2, **options)


def test_eager_attention_with_something_for_each_head_is_tried_with_its_heads() -> None:
    """gpt-oss groups heads in eager attention, its only one, and has a sink for each of its query heads."""
    torch.manual_seed(0)
    config = GptOssConfig(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=4,
                          num_attention_heads=8, num_key_value_heads=8, num_local_experts=2, num_experts_per_tok=1,
                          pad_token_id=0, eos_token_id=2)  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    assert model.config._attn_implementation == "eager"
    convert_to_gqa(model, 4)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
