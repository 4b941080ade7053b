"""Rows that make queries, keys and values, and what is behind them, against what the running model attends to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.any_model import UnseenAttention, UnseenConfig, UnseenModel, any_model
from support.calibrated import batches_for, lively, logits
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import AttentionInterface, OlmoConfig, OlmoForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_attnkit import convert_to_gqa, last_change
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.layers import projected_layers, weight_of
from hf_attnkit.refitting.queries import can_fit_queries

# Type: how keys are rotated, what is between keys and product, and between values and output projection.
BEHIND = {
    "gpt2": (None, "", ""),
    "opt": (None, "", ""),
    "bart": (None, "", ""),
    "whisper": (None, "", ""),
    "t5": (None, "", ""),
    "gpt_neox": (("half", 2), "", ""),
    "stablelm": (("half", 2), "", ""),
    "mixtral": (("half", 8), "", ""),
    "modernbert": (("half", 8), "", ""),
    "phi3": (("half", 8), "", ""),
    "gpt_oss": (("half", 8), "", ""),
    "cohere": (("interleaved", 8), "", ""),
    "gemma3": (("half", 8), "k_norm.weight", ""),
    "qwen3": (("half", 8), "k_norm.weight", ""),
    "never seen": (None, "scale", ""),
    "qwen3_next": (("half", 2), "k_norm.weight", "gate"),
    "gpt_bigcode": (None, "", ""),  # one key/value head, in a matrix with the queries
}


@pytest.mark.parametrize("model_type", BEHIND)
def test_what_is_behind_the_projections(model_type: str) -> None:
    rope, keys, values = BEHIND[model_type]
    for layer in projected_layers(any_model(model_type)):
        found = None if layer.rope is None else (layer.rope.pairing, layer.rope.size)
        assert found == rope and layer.norm == keys
        assert values in layer.between_values if values else not layer.between_values
        assert not layer.problems


@pytest.mark.parametrize("model_type", [each for each, (_, keys, _) in BEHIND.items() if not keys])
def test_rows_make_what_the_model_attends_to(model_type: str) -> None:
    """Of components that are not rotated: the rows' product with the projection's input is what arrives."""
    model = lively(model_type)
    layers, inputs = projected_layers(model), batches_for(model, 1)[0]
    calls: dict[int, Call] = {}
    given: dict[tuple[int, str], Tensor] = {}

    def watch(call: Call) -> tuple[Tensor, Any]:
        calls.setdefault(id(call.module), call)
        return call.run()

    handles = [
        getattr(layer, role).register_forward_pre_hook(
            lambda _, args, key=(layer.index, role): given.__setitem__(key, args[0])  # type: ignore[misc]
        )
        for layer in layers
        for role in ("query", "key", "value")
    ]
    with watched([layer.module for layer in layers], watch):
        logits(model, inputs)
    for handle in handles:
        handle.remove()
    for layer in layers:
        rotated = 0 if layer.rope is None else layer.rope.size
        for role, size in (("query", layer.head_dim), ("key", layer.head_dim), ("value", layer.value_head_dim)):
            module, rows = getattr(layer, role), layer.rows(role)
            made = given[layer.index, role] @ weight_of(module)[rows].T
            made = made if module.bias is None else made + module.bias[rows]
            made = made.unflatten(-1, (-1, size)).transpose(1, 2)
            arrived = getattr(calls[id(layer.module)], role)
            if role == "query" and model_type in ("opt", "whisper"):
                made = made * layer.head_dim**-0.5  # these scale their queries themselves
            first = rotated if role != "value" else 0
            torch.testing.assert_close(made[..., first:], arrived[..., first:], rtol=0, atol=1e-4)
        different = given[layer.index, "query"].shape != given[layer.index, "key"].shape
        assert layer.other_inputs == (frozenset({"query"}) if layer.is_cross else frozenset()) or not different
    assert {layer.is_cross for layer in layers} == ({True, False} if model.config.is_encoder_decoder else {False})


def test_a_clip_behind_the_keys_is_found() -> None:
    torch.manual_seed(0)
    config = OlmoConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                        num_key_value_heads=2, clip_qkv=8.0, eos_token_id=2)  # fmt: skip
    (layer,) = projected_layers(OlmoForCausalLM(config).eval())
    assert "without parameters" in layer.norm and "without parameters" in layer.between_values


class RelativeAttention(UnseenAttention):
    """A term of relative positions, made of the queries, next to their product with the keys."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.ask(x).view(batch, length, self.n, self.size).transpose(1, 2)
        told = self.tell(x).view(batch, length, 2, self.n // self.num_key_value_groups, self.size)
        value, key = told.permute(2, 0, 3, 1, 4)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        bias = query.sum(-1, keepdim=True) * distance
        attend = AttentionInterface().get_interface(self.config._attn_implementation, sdpa_attention_forward)
        out, _ = attend(self, query, key, value, bias, scaling=self.size**-0.5)
        return self.back(out.flatten(2))


def test_a_term_that_queries_make_next_to_their_product_is_found() -> None:
    torch.manual_seed(0)
    model = UnseenModel(UnseenConfig())
    model.parts = nn.ModuleList(RelativeAttention(model.config) for _ in range(2))
    for layer in projected_layers(model.eval()):
        assert layer.norm == "a bias of the scores, made of queries or keys," and not layer.between_values
        assert not can_fit_queries(layer)
    with unchanged(model), pytest.raises(ValueError, match="made of queries or keys, of layer 0"):
        convert_to_gqa(model, 1, method="pca")
    convert_to_gqa(model, 1, calibration=batches_for(model))  # keys by their mean
    assert last_change(model).key_method == "mean"  # type: ignore[union-attr]


def test_masks_of_other_positions_than_a_layer_s_are_not_its_padding() -> None:
    """An image's patches next to text: no mask says which of them are padding."""
    layers = projected_layers(any_model("owlvit"))
    found = {("vision" in layer.name, layer.padding) for layer in layers}
    assert found == {(True, ""), (False, "attention_mask")}


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (1, 1)])
def test_a_head_that_is_the_only_one_has_its_rows(heads: int, groups: int) -> None:
    """All heads alike reach them, or there is no other head: nothing differs that would tell them apart."""
    model = UnseenModel(UnseenConfig(heads=heads, groups=groups))
    for layer in projected_layers(model.eval()):
        size = 32 // heads
        assert not layer.problems and layer.query is layer.module.ask and layer.key is layer.value is layer.module.tell
        assert list(layer.rows("value")) == list(range(size)) and list(layer.rows("key")) == list(range(size, 2 * size))


def test_reasons_are_kept() -> None:
    (layer, *_) = projected_layers(any_model("olmo2"))
    assert "no rows of their own" in layer.problems["key"] and "k_norm.weight" in layer.problems["key"]
    assert layer.key is None and layer.value is not None
    (layer, *_) = projected_layers(any_model("deberta-v2"))
    assert "never calls" in layer.problems["query"] and layer.output is not None
