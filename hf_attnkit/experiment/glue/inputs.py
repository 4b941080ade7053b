"""From a task's texts to a model's inputs: tokenized, truncated, and what is odd about them said beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedModel

from hf_attnkit.experiment.glue.tasks import Task
from hf_attnkit.models.positions import positions


def check_max_length(max_length: int, task: Task, tokenizer: Any, model: PreTrainedModel) -> None:
    """Refuse a length that the model cannot take, or that leaves no room for the texts.

    Raises:
        ValueError: names `--max_length` and the bound.
    """
    most = positions(model)
    if most is not None and max_length > most:
        raise ValueError(f"--max_length {max_length} is longer than the model's {most} positions; give at most {most}")
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if max_length <= special:
        raise ValueError(f"--max_length {max_length} leaves no room next to {special} special tokens; give more")


def tokenized(
    split: str,
    rows: datasets.Dataset,
    task: Task,
    tokenizer: Any,
    max_length: int,
    label_ids: Sequence[int] | None,
    *,
    warn: bool = True,
) -> datasets.Dataset:
    """The model's inputs, and `labels` where the rows have a label; rows keep their order.

    Args:
        split: what messages call these rows.
        max_length: in tokens; longer inputs are truncated, the longer text of a pair first.
        label_ids: GLUE's class id -> the model's; `None` keeps labels as they are.
        warn: whether to say how many inputs are truncated and how many texts are blank.

    Raises:
        ValueError: an input without any token, which no model can read; names the row, counted from 0.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in task.text_columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        lengths = [len(ids) for ids in encoded["input_ids"]]
        # Only inputs that fill `max_length` may have been longer.
        full = [row for row, length in enumerate(lengths) if length == max_length]
        whole = tokenizer(*([text[row] for row in full] for text in texts), verbose=False)["input_ids"] if full else []
        longer = {row for row, ids in zip(full, whole, strict=True) if len(ids) > max_length}
        counted = {
            "truncated": [row in longer for row in range(len(lengths))],
            "blank": [not all(text.strip() for text in row) for row in zip(*texts, strict=True)],
            "empty": [length == 0 for length in lengths],
        }
        if "label" in batch:
            encoded["labels"] = [label_ids[label] if label_ids else label for label in batch["label"]]
        return encoded | counted

    rows = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenizing")
    counted = {column: rows[column][:] for column in ("empty", "truncated", "blank")}
    if any(counted["empty"]):
        row = counted["empty"].index(True)
        raise ValueError(
            f"{split}, row {row}: the text has no token, neither of its own nor a special one, so the model has "
            "nothing to read; drop such rows, or take a tokenizer that adds a token at the start"
        )
    for column, what in (
        ("truncated", f"inputs are longer than --max_length {max_length} tokens and truncated"),
        ("blank", "examples have a blank text"),
    ):
        number = sum(counted[column])
        if number and warn:
            warnings.warn(f"{split}: {number} of {len(rows)} {what} ({number / len(rows):.1%})", stacklevel=2)
    return rows.remove_columns(list(counted))
