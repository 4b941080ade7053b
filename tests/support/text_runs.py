"""Text, a tiny language model and a byte tokenizer, and a run of a recipe for text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import uptrain_gqa_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LINES = [f"the {'quick' if i % 2 else 'slow'} fox {i} jumps over {i * 7 % 13} dogs" for i in range(200)]


# Letters that only held-out text has.
HELD_OUT = [f"ZQ{line.upper()}QZ" for line in LINES[:30]]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<eos>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture(scope="module")
def text_checkpoint(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
                         initializer_range=0.2, bos_token_id=None, eos_token_id=0)  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    for name, lines in (("train.txt", LINES), ("dev.txt", HELD_OUT)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "train.txt", folder / "dev.txt"


def flags(checkpoint: Path, output: Path, text: tuple[Path, Path], *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(checkpoint), "--output_dir", str(output), "--train_file", str(text[0])),
        *("--block_size", "32", "--num_key_value_heads", "2", "--calibration_tokens", "500", "--max_steps", "4"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3", "--learning_rate", "1e-2"),
        *("--report_to", "none", "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "true", *more),
    ]


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict:
    monkeypatch.setattr(sys, "argv", ["uptrain_gqa_lm.py", *arguments])
    uptrain_gqa_lm.main()
    output = Path(arguments[arguments.index("--output_dir") + 1])
    return json.loads((output / "results.json").read_text())
