"""Tiny checkpoints of changed models, as version 0.1 (commit 03a1dd0) writes them: run with that version installed.

python tests/data/old_checkpoints/make.py tests/data/old_checkpoints
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_attnkit import convert_to_gqa, prune_heads, swap_attention

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 24}
INPUTS = torch.arange(18).view(2, 9)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=32, initializer_range=0.3)).eval()


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=32, initializer_range=0.3)
    return BertForSequenceClassification(config).eval()


MODELS = {
    "llama_pruned_by_layer": lambda: prune_heads(llama(), {0: [1], 1: [0, 3]}),
    "llama_converted": lambda: convert_to_gqa(llama(), 2),
    "llama_swapped": lambda: swap_attention(llama(), "sliding_window", window=4, layers=[1]),
    "bert_converted": lambda: convert_to_gqa(bert(), 2),
    "bert_without_heads_in_a_layer": lambda: prune_heads(bert(), {0: [0, 1, 2, 3], 1: [2]}),
    "bert_pruned_and_swapped": lambda: swap_attention(prune_heads(bert(), {1: [2]}), "linear"),
}

if __name__ == "__main__":
    for name, make in MODELS.items():
        folder = Path(sys.argv[1]) / name
        model = make()
        model.save_pretrained(folder)
        with torch.no_grad():
            save_file({"logits": model(INPUTS).logits.contiguous()}, folder / "expected.safetensors")
