"""Tiny checkpoints of changed models, as version 0.1 (commit 03a1dd0) writes them: run with that version installed.

python tests/data/old_checkpoints/make.py tests/data/old_checkpoints
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForTokenClassification,
)

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


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=1)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BartConfig(vocab_size=24, max_position_embeddings=32, d_model=16, encoder_layers=1, decoder_layers=2,
                        encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                        init_std=0.3, bos_token_id=0, pad_token_id=1, eos_token_id=2)  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=24, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, initializer_factor=2.0)
    return T5ForTokenClassification(config).eval()


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """What its kinds learn is not at its start value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hf_attnkit" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


MODELS = {
    "llama_pruned_by_layer": lambda: prune_heads(llama(), {0: [1], 1: [0, 3]}),
    "llama_converted": lambda: convert_to_gqa(llama(), 2),
    "llama_swapped": lambda: swap_attention(llama(), "sliding_window", window=4, layers=[1]),
    "bert_converted": lambda: convert_to_gqa(bert(), 2),
    "bert_without_heads_in_a_layer": lambda: prune_heads(bert(), {0: [0, 1, 2, 3], 1: [2]}),
    "gpt2_swapped": lambda: swap_attention(gpt2(), "sliding_window", window=4, layers=[1]),
    "gpt2_swapped_and_learned": lambda: trained(swap_attention(gpt2(), "linear", feature_map="hedgehog", window=4)),
    "bart_swapped": lambda: trained(
        swap_attention(
            bart(), {0: ("sliding_window", {"window": 3}), 2: ("linear", {"feature_map": "hedgehog"}), 4: ("gqa", {})}
        )
    ),
    "t5_swapped": lambda: swap_attention(t5(), "sliding_window", window=3),
    "bert_pruned_and_swapped": lambda: swap_attention(prune_heads(bert(), {1: [2]}), "linear"),
}

if __name__ == "__main__":
    for name, make in MODELS.items():
        folder = Path(sys.argv[1]) / name
        model = make()
        model.save_pretrained(folder)
        with torch.no_grad():
            save_file({"logits": model(INPUTS).logits.contiguous()}, folder / "expected.safetensors")
