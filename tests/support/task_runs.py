"""Runs over files in GLUE's layout, and what the server would be sent."""

from __future__ import annotations

from pathlib import Path

import torch
from support.glue_files import texts_of
from transformers import AutoTokenizer

import hf_attnkit
from hf_attnkit.experiment.glue.tasks import TASKS

BY_NAME = ("mnli", "ax", "qnli", "rte")  # the server wants class names for these and numbers for the others


def flags(checkpoint: Path | str, task: str, data: Path | None, output: Path, *more: str) -> list[str]:
    source = [] if data is None else ["--data_dir", str(data)]
    return [
        *("--model_name_or_path", str(checkpoint), "--task_name", task, *source, "--output_dir", str(output)),
        *("--max_length", "80", "--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--use_cpu"),
        *("--per_device_eval_batch_size", "3", "--learning_rate", "1e-5", "--report_to", "none", *more),
        *("--save_strategy", "no", "--disable_tqdm", "true"),
    ]


def server_file(model_folder: Path, task: str, split: str, count: int = 15) -> str:
    """What a model has to answer, one text at a time, in the server's form, spelt out here."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = hf_attnkit.load_pretrained(model_folder).eval()
    lines = ["index\tprediction"]
    for i, texts in enumerate(zip(*texts_of(task, split, count).values(), strict=True)):
        with torch.no_grad():
            logits = model(**tokenizer(*texts, truncation=True, max_length=80, return_tensors="pt")).logits[0]
        if task == "stsb":
            answer = f"{min(max(logits.item(), 0.0), 5.0):.3f}"
        else:
            answer = model.config.id2label[int(logits.argmax())]
            answer = answer if task in BY_NAME else str(TASKS[task].label_names.index(answer))
        lines.append(f"{i}\t{answer}")
    return "\n".join(lines) + "\n"


def same_predictions(left: str, right: str) -> None:
    """Equal, but scores to the last printed digit, on which padding may round differently."""
    rows, others = ([line.split("\t") for line in text.splitlines()] for text in (left, right))
    assert [row[0] for row in rows] == [row[0] for row in others]
    for (_, value), (_, other) in zip(rows[1:], others[1:], strict=True):
        assert value == other or abs(float(value) - float(other)) < 1.5e-3
