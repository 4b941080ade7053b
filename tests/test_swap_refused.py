"""Models that cannot be swapped are refused, by name or by the proof, and stay as they were."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_swap import batch, build, outputs
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from unchanged import unchanged

from hf_attnkit import families, swap_attention

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=99)).eval()


def deberta() -> PreTrainedModel:
    return DebertaV2Model(DebertaV2Config(**SIZES, intermediate_size=96)).eval()


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99)).eval()


@pytest.mark.parametrize("make", [bloom, deberta, gpt2])
def test_unknown_families_are_refused(make) -> None:
    model = make()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=f"{model.config.model_type}.*supported: bert, llama, mistral"),
    ):
        swap_attention(model, "flash")


def deberta_row() -> families.Family:
    """What someone might add: the projections have other names and the interface is never called."""
    return dataclasses.replace(
        families.FAMILIES["bert"],
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
    )


def bloom_row() -> families.Family:
    return families.Family(
        layers="h",
        attention="self_attention",
        query="self_attention.query_key_value",
        key="self_attention.query_key_value",
        value="self_attention.query_key_value",
        output="self_attention.dense",
        head_dim="head_dim",
        has_key_value_heads=False,
        rope=False,
    )


@pytest.mark.parametrize(("make", "row"), [(bloom, bloom_row), (deberta, deberta_row)], ids=["bloom", "deberta"])
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
def test_the_proof_refuses_models_that_never_call(make, row, layers, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.config._attn_implementation_internal = "sdpa"  # both accept the name and run eager code
    monkeypatch.setitem(families.FAMILIES, model.config.model_type, row())
    ids = torch.ones(1, 5, dtype=torch.long)
    before = model(ids)[0]
    numbers = r"\[1\]" if layers else r"\[0, 1\]"
    with unchanged(model), pytest.raises(ValueError, match=f"layers {numbers} .* never called the attention interface"):
        swap_attention(model, "flash", layers=layers)
    assert torch.equal(model(ids)[0], before)


def test_the_proof_names_the_layer_that_does_not_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of three with attention of its own."""
    model = build("llama", num_hidden_layers=3)
    attention = model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with unchanged(model), pytest.raises(ValueError, match=r"layers \[1\] of LlamaModel never called"):
        swap_attention(model, "flash")
    swap_attention(model, "flash", layers=[0, 2])
    assert outputs(model, batch(model)).isfinite().all()


def test_an_error_in_the_proof_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    swap_attention(model, "mha", layers=[0])

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.encoder.layer[1], "forward", broken)
    with unchanged(model), pytest.raises(RuntimeError, match="no memory"):
        swap_attention(model, {0: "flash", 1: ("sliding_window", {"window": 3})})


def test_a_set_name_without_kinds_fails_at_the_first_forward() -> None:
    model = build("bert")
    model.set_attn_implementation("hf_attnkit")
    with pytest.raises(ValueError, match=r"no kind of attention was chosen.*load_pretrained.*swap_attention"):
        model(**batch(model))
