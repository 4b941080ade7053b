"""What a model says about its attention, and that asking changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.every_type import small_config, small_model
from support.unchanged import unchanged
from torch import nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
)

from hf_attnkit import convert_to_gqa, prune_heads, swap_attention
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import Discovery, discover


def attentions(model_type: str) -> tuple[Attention, ...]:
    return discover(small_model(model_type)).attentions


@pytest.mark.parametrize(
    ("model_type", "facts"),
    [
        ("bert", {"num_heads": 4, "num_key_value_heads": 4, "is_causal": True}),  # BertLMHeadModel, a decoder
        ("llama", {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "is_causal": True, "calls": 1}),
        ("gemma2", {"window": 16, "softcap": 50.0}),
        ("gpt_oss", {"has_sinks": True, "window": 16}),
        ("t5", {"position_bias": True, "is_causal": False}),
        ("albert", {"calls": 2, "output": "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense"}),
        ("vit", {"is_causal": False, "num_heads": 4}),
        ("deepseek_v3", {"head_dim": 16, "value_head_dim": 8}),
        ("gpt2", {"output": "transformer.h.0.attn.c_proj"}),
        ("deberta-v2", {"calls_interface": False, "output": "deberta.encoder.layer.0.attention.output.dense"}),
    ],
)
def test_the_first_attention(model_type: str, facts: dict[str, Any]) -> None:
    first = attentions(model_type)[0]
    if model_type == "bert":
        facts = facts | {"is_causal": False}
    assert {name: getattr(first, name) for name in facts} == facts


def test_calling_order_and_cross_attention() -> None:
    found = attentions("bart")
    assert [each.index for each in found] == list(range(6))
    assert [each.path.split(".")[-1] for each in found] == ["self_attn"] * 4 + ["encoder_attn"] * 2
    assert [each.is_cross for each in found] == [False] * 4 + [True] * 2
    assert [each.is_causal for each in found] == [False, False, True, True, False, False]


def test_models_of_several_parts() -> None:
    for model_type, towers in (("clip", ("vision_model", "text_model")), ("llava", ("vision_tower", "language_model"))):
        found = discover(small_model(model_type))
        assert [sum(tower in each.path for each in found.attentions) for tower in towers] == [2, 2]
        assert found.not_run == ()


def test_a_part_that_the_inputs_do_not_reach_is_named() -> None:
    model = small_model("llava")
    tokens = torch.tensor([[3, 4, 5, 6]])
    found = discover(model, {"input_ids": tokens})
    assert found.not_run == ("model.vision_tower",)
    assert all("language_model" in each.path for each in found.attentions)


@pytest.mark.parametrize("model_type", ["llama", "bart", "clip", "deberta-v2", "gpt_oss"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes(model_type: str, training: bool) -> None:
    model = small_model(model_type).train(training)
    names = dict(AttentionInterface._global_mapping)
    asked, looked_up = AttentionInterface.get_interface, AttentionInterface.__getitem__
    before = torch.get_rng_state()
    with unchanged(model):
        found = discover(model)
        with pytest.raises(ValueError, match="does not run on the probe"):
            discover(model, {"nonsense": 1})
    assert isinstance(found, Discovery)
    assert torch.equal(torch.get_rng_state(), before)
    assert AttentionInterface._global_mapping == names
    assert (AttentionInterface.get_interface, AttentionInterface.__getitem__) == (asked, looked_up)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training is training


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_implementation_is_watched(implementation: str) -> None:
    model = small_model("llama")
    model.set_attn_implementation(implementation)
    assert [each.calls for each in discover(model).attentions] == [1, 1]
    assert model.config._attn_implementation == implementation


def test_the_same_in_16_bits() -> None:
    model = small_model("qwen3")
    want = discover(model).attentions
    got = discover(copy.deepcopy(model).bfloat16()).attentions
    assert [(a.path, a.num_heads, a.output, a.window) for a in got] == [
        (a.path, a.num_heads, a.output, a.window) for a in want
    ]


def test_inputs_that_cannot_be_made_are_asked_for() -> None:
    model = small_model("xmod")
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"(?s)takes input_ids, lang_ids.*probe=.*Input language unknown"),
    ):
        discover(model)
    found = discover(model, {"input_ids": torch.tensor([[3, 4, 5]]), "lang_ids": torch.tensor([0])})
    assert len(found.attentions) == 2


def test_a_model_without_attention() -> None:
    model = small_model("fnet")
    with unchanged(model), pytest.raises(ValueError, match=r"FNet.* has no attention"):
        discover(model)


def test_a_model_that_differs_from_run_to_run() -> None:
    model = small_model("vit_mae")  # masks patches at random, in evaluation mode too
    with unchanged(model), pytest.raises(ValueError, match=r"other outputs when it runs again.*differs by"):
        discover(model)


def test_models_without_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="meta device"):
        discover(model)


def test_quantized_models() -> None:
    model = BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    linear = model.encoder.layer[0].attention.self.query
    linear.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"query\.weight is quantized \(torch\.int8\)"):
        discover(model)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        discover(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_classifier_without_a_padding_token() -> None:
    """It takes one row only, and is looked at, swapped, pruned and converted as any other."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = LlamaForSequenceClassification(config).eval()
    assert [each.num_heads for each in discover(model).attentions] == [4, 4]
    convert_to_gqa(prune_heads(swap_attention(model, "flash"), {0: [0, 1]}), 1)
    assert [each.num_heads for each in discover(model).attentions] == [2, 4]


def test_what_takes_the_heads_of_attention_that_calls_no_interface() -> None:
    """Longformer's ends with a product of new inputs (global tokens); ConvBERT's heads have others beside them."""
    torch.manual_seed(0)
    model = LongformerForSequenceClassification(small_config(LongformerConfig)).eval()
    found = discover(model).attentions
    assert [each.output for each in found] == [f"longformer.encoder.layer.{n}.attention.output.dense" for n in (0, 1)]
    assert {(each.output, each.head_dim) for each in discover(small_model("convbert")).attentions} == {(None, 8)}
