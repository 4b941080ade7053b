"""Models that cannot be changed as they are: the exception says why and what to do, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import build
from support.unchanged import unchanged
from torch import nn

from hf_attnkit import (
    convert_to_gqa,
    convert_to_mqa,
    head_importance,
    load_pretrained,
    prune_heads,
    restore_attention,
    swap_attention,
)

# What changes a model, and what looks at its attention.
CHANGES = {
    "swap": lambda m: swap_attention(m, "gqa"),
    "gqa": lambda m: convert_to_gqa(m, 2),
    "mqa": convert_to_mqa,
    "prune": lambda m: prune_heads(m, {0: [0, 1]}),
    "importance": lambda m: head_importance(m, method="magnitude"),
    "entropy": lambda m: head_importance(m, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], method="entropy"),
}
EDITS = {name: change for name, change in CHANGES.items() if name != "swap"}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
every_edit = pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)


@every_change
def test_not_a_model(change: Callable) -> None:
    for thing, name in ((nn.Linear(2, 2), "Linear"), (None, "NoneType"), ("bert-base-uncased", "str")):
        with pytest.raises(TypeError, match=f"expected a transformers.PreTrainedModel, got {name}; pass the model"):
            change(thing)


@every_change
def test_compiled(change: Callable) -> None:
    inner = build("llama", "causal", 8, 4)
    compiled = torch.compile(inner)
    with unchanged(inner), pytest.raises(TypeError, match=r"got OptimizedModule; .* before torch.compile"):
        change(compiled)


@every_change
def test_with_adapters(change: Callable) -> None:
    model = get_peft_model(build("llama", "causal", 8, 4), LoraConfig(target_modules=["q_proj"]))
    with unchanged(model), pytest.raises(ValueError, match=r"PEFT adapters.*model.merge_and_unload\(\)"):
        change(model)
    inner = build("llama", "causal", 8, 4)
    inner.add_adapter(LoraConfig(target_modules=["v_proj"]))
    with unchanged(inner), pytest.raises(ValueError, match="PEFT adapters"):
        change(inner)


@every_change
def test_on_the_meta_device(change: Callable) -> None:
    with torch.device("meta"):
        model = build("llama", "causal", 8, 4)
    with unchanged(model), pytest.raises(ValueError, match=r"on the meta device.*load "):
        change(model)


class Linear4bit(nn.Linear):
    """As bitsandbytes' layers: a subclass whose weight is packed in another shape."""


@every_edit
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_quantized(change: Callable, projection: str) -> None:
    model = build("llama", "causal", 8, 4)
    attention = model.model.layers[1].self_attn
    old = getattr(attention, projection)
    packed = Linear4bit(old.in_features, old.out_features)
    packed.weight = nn.Parameter(torch.zeros(old.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    setattr(attention, projection, packed)
    with unchanged(model), pytest.raises(ValueError, match=r"layers.1.*is quantized .*without quantization"):
        change(model)


@every_edit
def test_attributes_that_disagree_with_the_weights(change: Callable) -> None:
    model = build("llama", "causal", 8, 4)
    model.model.layers[1].self_attn.num_key_value_groups = 4
    with unchanged(model), pytest.raises(ValueError, match="failed with: RuntimeError"):
        change(model)


@pytest.mark.parametrize("layers", [[], [0]], ids=["stock", "one layer swapped"])
def test_eager_bert_cannot_be_grouped(layers: list[int]) -> None:
    """Its eager attention does not group heads; one key/value head it broadcasts, which is right."""
    model = build("bert")
    model.set_attn_implementation("eager")
    if layers:
        swap_attention(model, "mha", layers=layers)
    with unchanged(model), pytest.raises(ValueError, match=r"eager attention.*'bert'.*sdpa.*swap"):
        EDITS["gqa"](model)


def test_a_grouped_bert_cannot_go_back_to_eager() -> None:
    model = build("bert")
    model.set_attn_implementation("eager")
    convert_to_gqa(swap_attention(model, "mha"), 2)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"eager attention.*'bert'.*set_attn_implementation\('sdpa'\)"),
    ):
        restore_attention(model)


def test_loading(tmp_path: Any) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    model = build("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither an auto class nor a model class"):
        load_pretrained(tmp_path, "AutoModel")
    with pytest.raises(ValueError, match="neither an auto class nor a model class"):
        load_pretrained(tmp_path, nn.Linear)
    config = copy.deepcopy(model.config)
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"architectures=None\); give auto_class, for example"):
        load_pretrained(tmp_path)
