"""Models that cannot be swapped are refused, by name or by the proof, and stay as they were."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.every_type import small_model
from support.models import batch, build, outputs
from support.unchanged import unchanged
from transformers import (
    AutoConfig,
    AutoModel,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
)

from hf_attnkit import head_importance, swap_attention
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import attention_layers

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=99)).eval()


def deberta() -> PreTrainedModel:
    return DebertaV2Model(DebertaV2Config(**SIZES, intermediate_size=96)).eval()


BYPASSING = ["bloom", "deberta", "deberta-v2", "falcon"]
TINY = {"bloom": {"n_layer": 2, "n_head": 4}}


@pytest.mark.parametrize(
    "call",
    [
        lambda model: swap_attention(model, "mha"),
        lambda model: swap_attention(model, "flash", layers=[1]),
        lambda model: head_importance(model, [{"input_ids": torch.ones(1, 5, dtype=torch.long)}], method="entropy"),
    ],
    ids=["swap", "one layer", "entropy"],
)
@pytest.mark.parametrize("model_type", BYPASSING)
def test_families_that_bypass_the_interface_are_refused(model_type: str, call) -> None:
    config = AutoConfig.for_model(model_type, **(SIZES | TINY.get(model_type, {})))
    model = AutoModel.from_config(config).eval()
    with unchanged(model), pytest.raises(ValueError, match="it never calls Transformers' attention interface"):
        call(model)
    assert head_importance(model, method="magnitude").shape == (2, 4)


@pytest.mark.parametrize("model_type", BYPASSING)
def test_the_reason_is_true(model_type: str) -> None:
    """No attention module of these files looks anything up in Transformers' interface."""
    config = AutoConfig.for_model(model_type, **(SIZES | TINY.get(model_type, {})))
    source = inspect.getsource(inspect.getmodule(type(AutoModel.from_config(config))))  # type: ignore[arg-type]
    assert "ALL_ATTENTION_FUNCTIONS" not in source


def test_the_proof_names_the_layer_that_does_not_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of three that has attended when it was looked at, and has attention of its own since."""
    model = build("llama", num_hidden_layers=3)
    attention = attention_layers(model)[1].module
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
    with unchanged(model), pytest.raises(ValueError, match="does not run with the new attention: RuntimeError: no mem"):
        swap_attention(model, {0: "flash", 1: ("sliding_window", {"window": 3})})


def test_a_set_name_without_kinds_fails_at_the_first_forward() -> None:
    model = build("bert")
    model.set_attn_implementation("hf_attnkit")
    with pytest.raises(ValueError, match=r"no kind of attention was chosen.*load_pretrained.*swap_attention"):
        model(**batch(model))


def test_a_mask_that_other_attention_cannot_read_is_the_reason() -> None:
    """BigBird-Pegasus' encoder attends by itself, with the mask that its decoder's attention gets through our name."""
    model = small_model("bigbird_pegasus")
    discover(model)  # for short inputs the model gives itself other attention, once
    reason = r"encoder.layers.0.self_attn.* never calls Transformers' attention interface .* gets the mask"
    with unchanged(model), pytest.raises(ValueError, match=reason):
        swap_attention(model, "flash")
    with unchanged(model), pytest.raises(ValueError, match=reason):
        swap_attention(model.model.decoder, "flash")
