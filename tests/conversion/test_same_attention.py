"""Heads in another basis: each attention is compared by itself, because the outputs of 16 bits would not show it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.unchanged import unchanged
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_attnkit import convert_to_gqa
from hf_attnkit.conversion import heads, same_attention
from hf_attnkit.conversion.heads import Heads
from hf_attnkit.models.layers import AttentionLayer

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def untrained(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Of Transformers' own initialisation, under which scores are small."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config: Any = GPT2Config(n_embd=64, n_layer=2, n_head=8, vocab_size=99, **ends)
        return GPT2LMHeadModel(config).eval().to(dtype)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=99, **ends)  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def calibration() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(1, 99, (8, 40), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def in_another_basis(model: PreTrainedModel, numbers: Any) -> PreTrainedModel:
    return convert_to_gqa(model, numbers, method="pca", calibration=calibration(), refit="none")


def wrong_keys(monkeypatch: pytest.MonkeyPatch, only: int | None = None) -> None:
    """Key heads are written negated, which no query follows."""
    right = heads.write

    def write(layer: AttentionLayer, found: Heads, constant: Tensor | None) -> Any:
        wrong = only is None or layer.index == only
        return right(layer, replace(found, key=-found.key) if wrong else found, constant)

    monkeypatch.setattr(heads, "write", write)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "number"), [("llama", 4), ("gpt2", 8)])
def test_a_right_basis_passes_and_a_wrong_one_is_caught(
    family: str, number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untrained(family, dtype)
    before = [parameter.clone() for parameter in model.parameters()]
    in_another_basis(model, number)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    model = untrained(family, dtype)
    wrong_keys(monkeypatch)
    with unchanged(model), pytest.raises(ValueError, match=r"layer 0.*: its scores differ by .* rounding explains"):
        in_another_basis(model, number)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_outputs_of_the_model_do_not_show_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of each attention the wrong keys would pass in bfloat16."""
    wrong_keys(monkeypatch)
    monkeypatch.setattr(same_attention.SameAttentions, "difference", lambda self: "")
    in_another_basis(untrained(family, torch.bfloat16), 8 if family == "gpt2" else 4)


@pytest.mark.parametrize(("family", "numbers"), [("llama", [2, 4]), ("gpt2", [4, 8])])
def test_a_layer_that_keeps_its_number_is_compared_where_others_lose_heads(
    family: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_another_basis(untrained(family, torch.float32), numbers)
    wrong_keys(monkeypatch, only=1)
    model = untrained(family, torch.float32)
    with unchanged(model), pytest.raises(ValueError, match=r"layer 1.*: its scores differ by"):
        in_another_basis(model, numbers)
