"""Which rows belong to a head: known layouts, and what must not mislead."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedModel, StableLmConfig, StableLmForCausalLM

from hf_attnkit.models import ownership as module
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.models.rotary_pairs import rotary_pairs


def owned(model: PreTrainedModel) -> Ownership:
    return ownerships(model, discover(model).attentions)[0]


def rows(one: Ownership, name: str, role: str, head: int) -> list[int]:
    return one.owned[name].of(role, head).tolist()


def block(start: int, size: int = 8) -> list[int]:
    return list(range(start, start + size))


def test_separate_projections() -> None:
    one = owned(small_model("llama"))
    assert not one.coupled and one.key_heads == (0, 1)
    for head in range(4):
        assert rows(one, "q_proj.weight", "query", head) == block(8 * head)
    for head in range(2):
        assert rows(one, "k_proj.weight", "key", head) == rows(one, "v_proj.weight", "value", head) == block(8 * head)
    assert set(one.owned) == {"q_proj.weight", "k_proj.weight", "v_proj.weight"}


def test_a_fused_conv1d() -> None:
    one = owned(small_model("gpt2"))
    assert one.owned["c_attn.weight"].dim == 1 and one.owned["c_attn.bias"].dim == 0
    for name in ("c_attn.weight", "c_attn.bias"):
        for position, role in enumerate(("query", "key", "value")):
            assert rows(one, name, role, 3) == block(32 * position + 24)


def test_fused_head_by_head() -> None:
    one = owned(small_model("gpt_neox"))
    for position, role in enumerate(("query", "key", "value")):
        assert rows(one, "query_key_value.weight", role, 2) == block(2 * 24 + 8 * position)


def test_fused_with_groups() -> None:
    one = owned(small_model("phi3"))
    assert rows(one, "qkv_proj.weight", "query", 3) == block(24)
    assert rows(one, "qkv_proj.weight", "key", 1) == block(32 + 8)
    assert rows(one, "qkv_proj.weight", "value", 0) == block(32 + 16)


def test_sinks_and_norms() -> None:
    sinks = owned(small_model("gpt_oss"))
    assert [rows(sinks, "sinks", "output", head) for head in range(4)] == [[0], [1], [2], [3]]
    assert owned(small_model("qwen3")).shared == ("q_norm.weight", "k_norm.weight")


def test_a_norm_for_each_head() -> None:
    config = StableLmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, qk_layernorm=True,
    )  # fmt: skip
    one = owned(StableLmForCausalLM(config).eval())
    for head in range(4):
        assert rows(one, f"q_layernorm.norms.{head}.weight", "query", head) == block(0)
        assert rows(one, f"q_layernorm.norms.{head}.weight", "query", (head + 1) % 4) == []


def test_gates_are_found_behind_the_attention() -> None:
    one = owned(small_model("qwen3_next"))
    assert not one.coupled
    # Query and gate are rows of one projection, head by head.
    assert rows(one, "q_proj.weight", "query", 1) == block(16)
    assert rows(one, "q_proj.weight", "output", 1) == block(24)


def test_latent_attention() -> None:
    one = owned(small_model("deepseek_v3"))
    assert "kv_a_proj_with_mqa.weight" in one.shared
    assert rows(one, "kv_b_proj.weight", "key", 1) == block(16)
    assert rows(one, "kv_b_proj.weight", "value", 1) == block(24)


def test_heads_that_cannot_be_told_apart_are_named() -> None:
    one = owned(small_model("olmo2"))
    assert "q_norm.weight" in one.coupled["q_proj.weight"]
    assert "k_norm.weight" in one.coupled["k_proj.weight"]
    assert "mixture of the heads" in owned(small_model("bitnet")).problem
    assert "alibi" in owned(small_model("bloom")).problem


def test_modules_that_never_call_the_interface() -> None:
    one = owned(small_model("deberta-v2"))
    for name in ("query_proj.weight", "key_proj.bias", "value_proj.weight"):
        assert rows(one, name, "output", 1) == block(8)


def test_weights_that_are_zero_do_not_mislead() -> None:
    model = small_model("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight[8:16] = 0
        attention.k_proj.weight.zero_()
        attention.v_proj.weight.zero_()
    with unchanged(model):
        one = owned(model)
    assert rows(one, "q_proj.weight", "query", 1) == block(8)
    assert rows(one, "k_proj.weight", "key", 1) == block(8)


def test_clipped_projections_are_owned() -> None:
    config = OlmoConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, clip_qkv=1.5
    )
    one = owned(OlmoForCausalLM(config).eval())
    assert rows(one, "q_proj.weight", "query", 2) == block(16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_gives_the_same(dtype: torch.dtype) -> None:
    model = small_model("qwen3")
    want = owned(model)
    converted = copy.deepcopy(model).to(dtype)
    with unchanged(converted):
        got = owned(converted)
    assert got.owned.keys() == want.owned.keys()
    for name, one in want.owned.items():
        for role, table in one.rows.items():
            assert torch.equal(got.owned[name].rows[role], table)


def test_layers_that_are_alike_are_looked_at_once() -> None:
    model = small_model("bart")  # self-attention of encoder and decoder, cross-attention
    attentions = discover(model).attentions
    with mock.patch.object(module, "ownership", autospec=True, side_effect=module.ownership) as looked:
        found = ownerships(model, attentions)
    assert len(found) == 6 and looked.call_count <= 3
    assert [one.output for one in found] == [f"{each.path}.out_proj" for each in attentions]


@pytest.mark.parametrize(
    ("model_type", "pairing", "pairs"),
    [
        ("llama", "half", 4),
        ("cohere", "interleaved", 4),
        ("glm", "interleaved", 2),
        ("qwen3", "half", 4),
        ("bert", None, 0),
    ],
)
def test_rotary_pairs(model_type: str, pairing: str | None, pairs: int) -> None:
    model = small_model(model_type)
    attention = discover(model).attentions[0]
    found = rotary_pairs(model, attention, owned(model))
    if pairing is None:
        assert found is None
    else:
        assert found is not None and (found.pairing, len(found.pairs)) == (pairing, pairs)
