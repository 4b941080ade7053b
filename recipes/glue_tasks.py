"""The table of GLUE tasks (Wang et al. 2018): columns, labels, metrics, and the TSV layout of each.

A new task is one row of `TASKS`. Names and label orders are those of the hub's `nyu-mll/glue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TsvLayout:
    """How the GLUE benchmark's own TSV files write a task.

    Attributes:
        text_fields: Where the texts stand, in the order of `Task.text_columns`: header names, or
            0-based positions where the files have no header.
        label_field: Where the label stands, likewise.
        label_kind: How a label is written: `"int"` the class id, `"word"` the class name,
            `"float"` a score from 0 to 5, both inclusive.
        columns: Columns of a row where the files have no header; `None`: the first line is a
            header, and every row has as many columns as it.
        train_file: File name of the training split.
        dev_files: File names of the development splits, in the order of `Task.dev_splits`.
    """

    text_fields: tuple[str, ...] | tuple[int, ...]
    label_field: str | int
    label_kind: Literal["int", "word", "float"] = "int"
    columns: int | None = None
    train_file: str = "train.tsv"
    dev_files: tuple[str, ...] = ("dev.tsv",)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Name on the hub and in the recipes, e.g. `"sst2"`.
        folder: Folder name in the benchmark's download, e.g. `"SST-2"`; `None` if it has none.
        text_columns: The one or two text columns of the loaded dataset.
        label_names: Class names, the position is the class id; empty for regression.
        metrics: What `GlueMetric` returns, higher = better; the first is the headline.
        tsv: Layout of the TSV files; `None` if the task has none.
        dev_splits: Names of the development splits in the loaded dataset.
    """

    name: str
    folder: str | None
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    tsv: TsvLayout | None
    dev_splits: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score (float) and not a class id (int)."""
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Outputs of a classification head for this task: classes, or 1 for regression."""
        return len(self.label_names) or 1


_SENTENCE = ("sentence",)
_SENTENCES = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_ACCEPTABLE = ("unacceptable", "acceptable")
_ENTAILMENT_FIRST = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            folder="CoLA",
            text_columns=_SENTENCE,
            label_names=_ACCEPTABLE,
            metrics=("matthews_correlation", "accuracy"),
            tsv=TsvLayout(text_fields=(3,), label_field=1, columns=4),
        ),
        Task(
            name="sst2",
            folder="SST-2",
            text_columns=_SENTENCE,
            label_names=("negative", "positive"),
            metrics=("accuracy",),
            tsv=TsvLayout(text_fields=_SENTENCE, label_field="label"),
        ),
        Task(
            name="mrpc",
            folder="MRPC",
            text_columns=_SENTENCES,
            label_names=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            tsv=TsvLayout(text_fields=("#1 String", "#2 String"), label_field="Quality"),
        ),
        Task(
            name="stsb",
            folder="STS-B",
            text_columns=_SENTENCES,
            label_names=(),
            metrics=("pearson", "spearmanr"),
            tsv=TsvLayout(text_fields=_SENTENCES, label_field="score", label_kind="float"),
        ),
        Task(
            name="qqp",
            folder="QQP",
            text_columns=_QUESTIONS,
            label_names=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            tsv=TsvLayout(text_fields=_QUESTIONS, label_field="is_duplicate"),
        ),
        Task(
            name="mnli",
            folder="MNLI",
            text_columns=("premise", "hypothesis"),
            label_names=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            tsv=TsvLayout(
                text_fields=_SENTENCES,
                label_field="gold_label",
                label_kind="word",
                dev_files=("dev_matched.tsv", "dev_mismatched.tsv"),
            ),
            dev_splits=("validation_matched", "validation_mismatched"),
        ),
        Task(
            name="qnli",
            folder="QNLI",
            text_columns=("question", "sentence"),
            label_names=_ENTAILMENT_FIRST,
            metrics=("accuracy",),
            tsv=TsvLayout(
                text_fields=("question", "sentence"),
                label_field="label",
                label_kind="word",
            ),
        ),
        Task(
            name="rte",
            folder="RTE",
            text_columns=_SENTENCES,
            label_names=_ENTAILMENT_FIRST,
            metrics=("accuracy",),
            tsv=TsvLayout(text_fields=_SENTENCES, label_field="label", label_kind="word"),
        ),
        Task(
            name="wnli",
            folder="WNLI",
            text_columns=_SENTENCES,
            label_names=("not_entailment", "entailment"),
            metrics=("accuracy",),
            tsv=TsvLayout(text_fields=_SENTENCES, label_field="label"),
        ),
        # Not GLUE: this project's own sentences (demo_data.py), for runs without data or network.
        Task(
            name="demo",
            folder=None,
            text_columns=_SENTENCE,
            label_names=_ACCEPTABLE,
            metrics=("matthews_correlation", "accuracy"),
            tsv=None,
        ),
    )
}


def get_task(name: str) -> Task:
    """The row of `TASKS` called `name`.

    Raises:
        ValueError: No task has that name; the message lists those that there are.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}: use one of {', '.join(TASKS)}.")
    return TASKS[name]
