"""A tiny model and tokenizer for the recipes, and a run of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_attnkit.experiment.glue.demo_data import make_demo_data

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for row in make_demo_data()["train"] for word in row["sentence"].lower()[:-1].split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, ".", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]")  # fmt: skip


@pytest.fixture(scope="module", params=["bert", "llama"])
def checkpoint(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
    if request.param == "bert":
        model = BertForSequenceClassification(BertConfig(**common))
    else:  # no pad_token_id: the recipe has to supply it
        model = LlamaForSequenceClassification(LlamaConfig(**common, bos_token_id=2, eos_token_id=3))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(checkpoint: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(checkpoint), "--task_name", "demo", "--output_dir", str(output)),
        *("--max_train_samples", "64", "--max_eval_samples", "40", "--max_length", "24", "--report_to", "none"),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--save_strategy", "no", "--use_cpu"),
        *more,
    ]


def run(module, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()
    output = Path(arguments[arguments.index("--output_dir") + 1])
    return json.loads((output / "results.json").read_text())
