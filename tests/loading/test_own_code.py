"""Models whose class is not Transformers': registered, or code that comes with the checkpoint."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, dynamic_module_utils

from hf_attnkit import load_pretrained, prune_heads

CODE = '''
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class OddConfig(PreTrainedConfig):
    model_type = "odd_order"

    def __init__(self, width=16, heads=4, **others):
        self.width, self.heads = width, heads
        super().__init__(**others)


class OddAttention(nn.Module):
    """Values of all heads first, then query and key of each head in turn."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config, self.heads, self.size = config, config.heads, config.width // config.heads
        self.vqk, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x):
        batch, length, _ = x.shape
        both, width = self.vqk(x), self.heads * self.size
        value = both[..., :width].view(batch, length, self.heads, self.size).transpose(1, 2)
        query, key = both[..., width:].view(batch, length, self.heads, 2, self.size).permute(3, 0, 2, 1, 4)
        attend = AttentionInterface().get_interface(self.config._attn_implementation, sdpa_attention_forward)
        out, _ = attend(self, query, key, value, None, scaling=self.size**-0.5)
        return self.out(out.reshape(batch, length, width))


class OddModel(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.attention = nn.Embedding(32, config.width), OddAttention(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return (x + self.attention(x),)
'''
IDS = {"input_ids": torch.arange(3, 11)[None]}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The code as a module of a file."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "odd_order.py"
    file.write_text(CODE)
    spec = importlib.util.spec_from_file_location("odd_order", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "odd_order", module)
    spec.loader.exec_module(module)
    return module


def pruned(code: Any) -> tuple[Any, Any]:
    """A model of the code, and what it puts out."""
    torch.manual_seed(0)
    model = prune_heads(code.OddModel(code.OddConfig()).eval(), {0: [0, 3]})
    with torch.no_grad():
        return model, model(**IDS)[0]


@pytest.mark.parametrize("auto_class", [None, AutoModel])
def test_code_that_comes_with_the_checkpoint(auto_class: Any, code: Any, tmp_path: Path) -> None:
    """And again, when the loaded model is saved."""
    code.OddConfig.register_for_auto_class()
    code.OddModel.register_for_auto_class("AutoModel")
    model, want = pruned(code)
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load_pretrained(tmp_path / name, auto_class, trust_remote_code=False)
        model = load_pretrained(tmp_path / name, auto_class, trust_remote_code=True).eval()
        assert type(model).__name__ == "OddModel" and type(model) is not code.OddModel
        with torch.no_grad():
            assert torch.equal(model(**IDS)[0], want)


def test_a_registered_class(code: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, want = pruned(code)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="odd_order"):
        load_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="the model's own class"):
        load_pretrained(tmp_path / "saved", config=code.OddConfig.from_pretrained(tmp_path / "saved"))
    assert torch.equal(load_pretrained(tmp_path / "saved", code.OddModel).eval()(**IDS)[0], want)
    mapping = AutoModel._model_mapping._extra_content
    monkeypatch.setitem(mapping, code.OddConfig, code.OddModel)
    loaded = load_pretrained(tmp_path / "saved", config=code.OddConfig.from_pretrained(tmp_path / "saved")).eval()
    assert type(loaded) is code.OddModel and torch.equal(loaded(**IDS)[0], want)
