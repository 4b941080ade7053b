"""Heads cut out of anything: exact, proven, all or nothing."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from support.cutting import a_group, check, zeroed_outputs
from support.every_type import small_model
from support.unchanged import unchanged
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel, StableLmConfig, StableLmForCausalLM

from hf_attnkit.editing.alone import Alone
from hf_attnkit.editing.cut_heads import cut_heads
from hf_attnkit.editing.proof import Zeroed
from hf_attnkit.models.discovery import Discovery, discover, run_outputs
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships


def looked_at(model: PreTrainedModel) -> tuple[Discovery, list[Ownership]]:
    discovery = discover(model)
    return discovery, ownerships(model, discovery.attentions)


TYPES = ("llama", "bert", "gpt2", "gpt_neox", "phi3", "modernbert", "bart", "whisper", "clip", "llava", "albert", "opt",
         "mixtral", "gemma2", "gpt_oss", "qwen3_next", "deepseek_v3", "falcon", "gptj", "deberta-v2", "t5", "mt5",
         "longt5", "mpnet", "switch_transformers")  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_cut_equals_zeroed_in_float64(model_type: str) -> None:
    """Against the model in float64, where only rounding at 1e-16 is left: nothing but the heads is gone."""
    model = small_model(model_type)
    discovery, owned = looked_at(model)
    heads = {i: a_group(each.num_heads, owned[i]) for i, each in enumerate(discovery.attentions)}
    # Experts have no kernel for float64, and eager attention takes its softmax in float32, where masks overflow.
    if not hasattr(model.config, "num_experts_per_tok") and model.config._attn_implementation == "sdpa":
        model = model.double()
        discovery, owned = looked_at(model)
    want = zeroed_outputs(model, discovery, owned, heads)
    untouched = run_outputs(model, discovery.inputs)
    cut = cut_heads(model, heads, discovery, owned)
    tolerance = 1e-11 if model.dtype == torch.float64 else 1e-4
    with torch.no_grad():
        for got, expected in zip(run_outputs(model, discovery.inputs), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * (1 + float(expected.abs().max())))
    assert any((a - b).abs().max() > 1e-4 * b.abs().max() for a, b in zip(untouched, want, strict=True))
    for index, (number, groups) in cut.heads.items():
        found = discover(model, discovery.inputs).attentions[index]
        assert found.num_heads == number == discovery.attentions[index].num_heads - len(heads[index])
        if found.calls_interface and found.num_key_value_heads != found.num_heads:
            assert found.num_key_value_heads == groups
    cut.undo()
    assert all(torch.equal(a, b) for a, b in zip(run_outputs(model, discovery.inputs), untouched, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2"])
def test_in_16_bits(model_type: str, dtype: torch.dtype) -> None:
    model = small_model(model_type).to(dtype)
    discovery, owned = looked_at(model)
    cut_heads(model, {0: a_group(4, owned[0])}, discovery, owned)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_the_same_number_from_each_group() -> None:
    model = small_model("llama")
    discovery, owned = looked_at(model)
    check(model, discovery, owned, {0: [1, 2]})
    cut = cut_heads(model, {0: [1, 2]}, discovery, owned)
    assert cut.heads == {0: (2, 2)}
    assert cut.numbers == {"model.layers.0.self_attn": {"num_key_value_groups": 1}}


def test_a_norm_for_each_head_goes_with_it() -> None:
    config = StableLmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, qk_layernorm=True, pad_token_id=0,
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norms" in name:
                parameter.normal_()
    discovery, owned = looked_at(model)
    check(model, discovery, owned, {0: [1]})
    kept = [model.model.layers[0].self_attn.q_layernorm.norms[head] for head in (0, 2, 3)]
    cut_heads(model, {0: [1]}, discovery, owned)
    assert list(model.model.layers[0].self_attn.q_layernorm.norms) == kept


def test_config_that_is_read_while_running_changes_with_all_layers_only() -> None:
    model = small_model("phi3")
    discovery, owned = looked_at(model)
    with unchanged(model), pytest.raises(ValueError, match=r"reads the config's num_attention_heads.*all layers"):
        cut_heads(model, {0: [0, 1]}, discovery, owned)
    cut = cut_heads(model, {0: [0, 1], 1: [2, 3]}, discovery, owned)
    assert (model.config, "num_attention_heads", 4, 2) in cut.config
    assert model.config.num_attention_heads == 2
    cut.undo()
    assert model.config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({0: [9]}, "head 9 is out of range"),
        ({7: [0]}, "attention 7 is out of range"),
        ({0: [0, 0]}, "named twice"),
        ({0: [True]}, "is no integer"),
        ({0: [0]}, r"groups of \[1, 2\]"),
    ],
)
def test_what_cannot_be_asked_for(removed: dict[int, list[int]], message: str) -> None:
    model = small_model("llama")
    discovery, owned = looked_at(model)
    with unchanged(model), pytest.raises(ValueError, match=message):
        cut_heads(model, removed, discovery, owned)


def test_integers_of_numpy_and_torch_count() -> None:
    model = small_model("bert")
    discovery, owned = looked_at(model)
    cut = cut_heads(model, {0: np.array([1]), 1: torch.tensor([2])}, discovery, owned)  # type: ignore[dict-item]
    assert cut.heads == {0: (3, 3), 1: (3, 3)}


@pytest.mark.parametrize(("model_type", "name"), [("olmo2", "q_proj.weight"), ("bloom", "alibi")])
def test_coupled_heads_are_refused_by_name(model_type: str, name: str) -> None:
    model = small_model(model_type)
    discovery, owned = looked_at(model)
    with unchanged(model), pytest.raises(ValueError, match=f"heads cannot be cut: .*{name}"):
        cut_heads(model, {0: [0]}, discovery, owned)


@pytest.mark.parametrize("wrap", [lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm])
def test_wrapped_parameters_are_refused(wrap) -> None:  # type: ignore[no-untyped-def]
    model = small_model("bert")
    wrap(model.bert.encoder.layer[0].attention.self.query)
    discovery, owned = looked_at(model)
    with pytest.raises(ValueError, match="is made from other parameters"):
        cut_heads(model, {0: [0]}, discovery, owned)


def test_shared_parameters_are_refused() -> None:
    model = small_model("bert")
    first, second = (model.bert.encoder.layer[i].attention.self for i in range(2))
    second.query.weight = first.query.weight
    discovery, owned = looked_at(model)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"shared with bert\.encoder\.layer\.1\.attention\.self\.query"),
    ):
        cut_heads(model, {0: [0]}, discovery, owned)


def test_requires_grad_and_training_mode_stay() -> None:
    model = small_model("bert").train()
    model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    discovery, owned = looked_at(model)
    cut_heads(model, {0: [0]}, discovery, owned)
    query = model.bert.encoder.layer[0].attention.self.query
    assert not query.weight.requires_grad and query.bias.requires_grad
    assert (query.out_features, model.bert.encoder.layer[0].attention.self.all_head_size) == (24, 24)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("where", ["inference mode", "autocast", "another default dtype"])
def test_the_same_under(where: str) -> None:
    model = small_model("gpt_oss")
    with ExitStack() as stack:
        if where == "inference mode":
            stack.enter_context(torch.inference_mode())
        elif where == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        else:
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
        discovery, owned = looked_at(model)
        cut = cut_heads(model, {0: [0, 1]}, discovery, owned)
    assert cut.heads == {0: (2, 1)}
    query = model.model.layers[0].self_attn.q_proj.weight
    assert (query.dtype, query.is_inference(), tuple(query.shape)) == (torch.float32, False, (16, 32))


def test_the_proof_sees_another_head_gone() -> None:
    """The proof is worth something: cut head 1, and it does not pass for head 2."""
    model = small_model("bert")
    discovery, owned = looked_at(model)
    paths = {each.index: own.output for each, own in zip(discovery.attentions, owned, strict=True)}
    right = Zeroed(model, discovery.attentions[:1], {0: [1]}, discovery.inputs, paths)
    wrong = Zeroed(model, discovery.attentions[:1], {0: [2]}, discovery.inputs, paths)
    cut_heads(model, {0: [1]}, discovery, owned)
    assert right.difference() == ""
    assert "more than" in wrong.difference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_head_is_compared_in_float32(dtype: torch.dtype) -> None:
    model = small_model("bert").to(dtype)
    discovery, owned = looked_at(model)
    alone = Alone(model, discovery.attentions[0], owned[0])
    with torch.no_grad():
        before = alone.heads()
    cut_heads(model, {0: [1]}, discovery, owned)
    with torch.no_grad():
        assert alone.difference(before[[0, 2, 3]]) == ""
        assert "differ from what they were" in alone.difference(before[[0, 1, 3]])


def test_a_failing_proof_puts_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    discovery, owned = looked_at(model)
    monkeypatch.setattr(Zeroed, "difference", lambda self: "it is off")
    with unchanged(model), pytest.raises(ValueError, match="it is off; the model is unchanged"):
        cut_heads(model, {0: [0, 1]}, discovery, owned)


def test_gradients_are_those_of_the_zeroed_model() -> None:
    model = small_model("llama").double()
    discovery, _ = looked_at(model)
    cut = copy.deepcopy(model)
    other = discover(cut)
    cut_heads(cut, {0: [0, 1]}, other, ownerships(cut, other.attentions))
    run_outputs(cut, discovery.inputs)[0].square().sum().backward()
    attention = model.model.layers[0].self_attn

    def zero(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        keep = torch.ones(32, dtype=torch.float64)
        keep[:16] = 0
        return (args[0] * keep,)

    attention.o_proj.register_forward_pre_hook(zero)
    run_outputs(model, discovery.inputs)[0].square().sum().backward()
    got, want = cut.model.layers[0].self_attn, attention
    torch.testing.assert_close(got.q_proj.weight.grad, want.q_proj.weight.grad[16:])
    torch.testing.assert_close(got.v_proj.weight.grad, want.v_proj.weight.grad[8:])
    torch.testing.assert_close(cut.model.embed_tokens.weight.grad, model.model.embed_tokens.weight.grad)
