"""The report on a model's attention, and a model of a class that Transformers has never seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from hf_attnkit.analysis.describe_attention import describe_attention
from hf_attnkit.editing.cut_heads import cut_heads
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.ownership import ownerships


class OwnConfig(PreTrainedConfig):
    model_type = "seen_nowhere"


class OwnAttention(nn.Module):
    """Values before keys before queries, interleaved by component: no layout that a table would know."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config, self.crowd, self.width = config, 4, 8
        self.everything = nn.Linear(32, 96)
        self.back = nn.Linear(32, 32)

    def forward(self, states: Tensor) -> Tensor:
        mixed = self.everything(states).view(*states.shape[:2], 3, self.width, self.crowd).permute(2, 0, 4, 1, 3)
        value, key, query = mixed
        attend = AttentionInterface().get_interface(self.config._attn_implementation, None)
        output, _ = attend(self, query, key, value, None, dropout=0.0, scaling=0.3, is_causal=True)
        return self.back(output.flatten(2))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(OwnAttention(config) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor]:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = states + block(states)
        return (states,)


def test_a_class_that_transformers_has_never_seen() -> None:
    model = OwnModel(OwnConfig(vocab_size=50)).eval()
    report = describe_attention(model)
    assert [row.path for row in report.rows] == ["blocks.0", "blocks.1"]
    assert all(not row.prune and not row.swap and not row.convert for row in report.rows)
    discovery = discover(model)
    owned = ownerships(model, discovery.attentions)
    assert owned[0].owned["everything.weight"].of("value", 1).tolist() == list(range(1, 32, 4))
    cut = cut_heads(model, {0: [1], 1: [0, 3]}, discovery, owned)
    assert [(block.crowd, block.width, block.everything.out_features) for block in model.blocks] == [
        (3, 8, 72),
        (2, 8, 48),
    ]
    assert cut.numbers == {"blocks.0": {"crowd": 3}, "blocks.1": {"crowd": 2}}


def test_what_can_be_done_and_why_not() -> None:
    for model_type, can, reason in [
        ("llama", "swap score prune convert", ""),
        ("gpt_oss", "swap score prune convert", ""),
        ("olmo2", "swap score", "q_norm.weight"),
        ("gptj", "prune", "never calls"),
        ("deepseek_v3", "swap score prune", "latent attention"),
    ]:
        model = small_model(model_type)
        with unchanged(model):
            row = describe_attention(model).rows[0]
        given = {name: getattr(row, name) for name in ("swap", "score", "prune", "convert")}
        assert " ".join(name for name, why in given.items() if not why) == can
        assert all(reason in why for why in given.values() if why)


def test_the_table() -> None:
    text = str(describe_attention(small_model("gpt_oss")))
    lines = text.splitlines()
    names = "attention heads key/value size sees window rotary swap score prune convert"
    first = "model.layers.0.self_attn 4 2 8 past 16 half 8/8 yes yes yes yes"
    assert [" ".join(line.split()) for line in lines[:2]] == [names, first]


def test_inputs_of_the_users_own() -> None:
    model = small_model("llava")
    report = describe_attention(model, probe={"input_ids": torch.tensor([[3, 4, 5]])})
    assert str(report).endswith("not reached by the inputs: model.vision_tower")
    with pytest.raises(ValueError, match="does not run on the probe"):
        describe_attention(model, probe={"input_ids": "text"})
