"""The table of tasks: the columns, labels, metrics and TSV layout of each, and where its data is.

A new task is one row of `TASKS`. Those of GLUE (Wang et al. 2018) have the names and label orders of the hub's
`nyu-mll/glue`; a row says by itself whether it is one of them, and a task of your own leaves `is_benchmark` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal


@dataclass(frozen=True)
class TsvLayout:
    """How the GLUE benchmark's own TSV files write a task.

    Attributes:
        text_fields: Where the texts are, in the order of `Task.text_columns`: header names, or
            0-based positions where the files have no header.
        label_field: Where the label is, likewise.
        label_kind: How a label is written: `"int"` the class id, `"word"` the class name,
            `"float"` a score from 0 to 5, both inclusive.
        columns: Columns of a row where the files have no header; `None`: the first line is a
            header, and every row has as many columns as it.
        train_file: File name of the training split.
        dev_files: File names of the development splits, in the order of `Task.dev_splits`.
        test_files: Those of the test splits, in the order of `Task.test_splits`.
        test_fields: Header names of the texts in the test files, which all have a header and no
            label; `None`: `text_fields`.
    """

    text_fields: tuple[str, ...] | tuple[int, ...]
    label_field: str | int
    label_kind: Literal["int", "word", "float"] = "int"
    columns: int | None = None
    train_file: str = "train.tsv"
    dev_files: tuple[str, ...] = ("dev.tsv",)
    test_files: tuple[str, ...] = ("test.tsv",)
    test_fields: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Name on the hub and in the recipes, e.g. `"sst2"`.
        folder: Folder name in a download of all tasks, e.g. `"SST-2"`; reports call the task so, too.
        text_columns: The one or two text columns of the loaded dataset.
        label_names: Class names, the position is the class id; empty for regression.
        metrics: What `GlueMetric` returns, higher = better; the first is the headline.
        tsv: Layout of the TSV files; `None` if the task has none.
        hub_path: The dataset on the hub, e.g. `"nyu-mll/glue"`; `None` if there is none, so that data has to be local.
        hub_config: Its configuration; `None` if it has none.
        language: Of the texts, as ISO 639 writes it; `None` if unknown.
        is_benchmark: Whether it is a task of GLUE.
        dev_splits: Names of the development splits in the loaded dataset; none if nothing of the
            task is labelled.
        test_splits: Names of the splits whose labels GLUE keeps.
        score_metrics: The metrics whose mean is the task's score in GLUE's average.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    tsv: TsvLayout | None
    hub_path: str | None = None
    hub_config: str | None = None
    language: str | None = None
    is_benchmark: bool = False
    dev_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    score_metrics: tuple[str, ...] = ("accuracy", "f1", "pearson", "spearmanr")

    @property
    def layout(self) -> TsvLayout:
        """`tsv`, of a task that has one.

        Raises:
            ValueError: it has none.
        """
        if self.tsv is None:
            raise ValueError(f"Task {self.name!r} has no layout of TSV files: give its row in glue/tasks.py a `tsv`.")
        return self.tsv

    @property
    def is_labelled(self) -> bool:
        """Whether there is anything to train on and to measure; not for the diagnostic set AX."""
        return bool(self.dev_splits)

    @property
    def prediction_files(self) -> tuple[str, ...]:
        """Names for the predictions of each of `test_splits`, as the GLUE server wants them."""
        ends = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
        return tuple(f"{self.folder}{ends.get(split, f'-{split}')}.tsv" for split in self.test_splits)

    def split_files(self, splits: Sequence[str]) -> list[str]:
        """The TSV file of each of these splits."""
        named = {"train": self.layout.train_file}
        named |= zip(self.dev_splits, self.layout.dev_files, strict=True)
        named |= zip(self.test_splits, self.layout.test_files, strict=False)  # a task may have no test split
        return [named[split] for split in splits]

    def score(self, metrics: Mapping[str, float]) -> float:
        """What counts in GLUE's average: the mean of the task's measured metrics, those of both dev sets for mnli."""
        return fmean(value for name, value in metrics.items() if name.startswith(self.score_metrics))

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


def _glue(name: str, **row: Any) -> Task:
    return Task(name=name, hub_path="nyu-mll/glue", hub_config=name, language="en", is_benchmark=True, **row)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            name="cola",
            folder="CoLA",
            text_columns=_SENTENCE,
            label_names=_ACCEPTABLE,
            metrics=("matthews_correlation", "accuracy"),
            tsv=TsvLayout(text_fields=(3,), label_field=1, columns=4, test_fields=_SENTENCE),
            score_metrics=("matthews_correlation",),
        ),
        _glue(
            name="sst2",
            folder="SST-2",
            text_columns=_SENTENCE,
            label_names=("negative", "positive"),
            metrics=("accuracy",),
            tsv=TsvLayout(text_fields=_SENTENCE, label_field="label"),
        ),
        _glue(
            name="mrpc",
            folder="MRPC",
            text_columns=_SENTENCES,
            label_names=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            tsv=TsvLayout(text_fields=("#1 String", "#2 String"), label_field="Quality"),
        ),
        _glue(
            name="stsb",
            folder="STS-B",
            text_columns=_SENTENCES,
            label_names=(),
            metrics=("pearson", "spearmanr"),
            tsv=TsvLayout(text_fields=_SENTENCES, label_field="score", label_kind="float"),
        ),
        _glue(
            name="qqp",
            folder="QQP",
            text_columns=_QUESTIONS,
            label_names=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            tsv=TsvLayout(text_fields=_QUESTIONS, label_field="is_duplicate"),
        ),
        _glue(
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
                test_files=("test_matched.tsv", "test_mismatched.tsv"),
            ),
            dev_splits=("validation_matched", "validation_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
        ),
        _glue(
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
        _glue(
            name="rte",
            folder="RTE",
            text_columns=_SENTENCES,
            label_names=_ENTAILMENT_FIRST,
            metrics=("accuracy",),
            tsv=TsvLayout(text_fields=_SENTENCES, label_field="label", label_kind="word"),
        ),
        _glue(
            name="wnli",
            folder="WNLI",
            text_columns=_SENTENCES,
            label_names=("not_entailment", "entailment"),
            metrics=("accuracy",),
            tsv=TsvLayout(text_fields=_SENTENCES, label_field="label"),
        ),
        # The diagnostic set: for a model of mnli, and without labels.
        _glue(
            name="ax",
            folder="AX",
            text_columns=("premise", "hypothesis"),
            label_names=("entailment", "neutral", "contradiction"),
            metrics=(),
            tsv=TsvLayout(
                text_fields=_SENTENCES,
                label_field="label",
                label_kind="word",
                dev_files=(),
                test_files=("diagnostic.tsv",),
            ),
            dev_splits=(),
        ),
        # Not GLUE: this project's own sentences (demo_data.py), for runs without data or network.
        Task(
            name="demo",
            folder="demo",
            language="en",
            text_columns=_SENTENCE,
            label_names=_ACCEPTABLE,
            metrics=("matthews_correlation", "accuracy"),
            tsv=None,
            test_splits=(),
            score_metrics=("matthews_correlation",),
        ),
    )
}

# The nine that GLUE's average counts.
BENCHMARK = tuple(name for name, task in TASKS.items() if task.is_benchmark and task.is_labelled)


def get_task(name: str) -> Task:
    """The row of `TASKS` called `name`.

    Raises:
        ValueError: No task has that name; the message lists those that there are.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}: use one of {', '.join(TASKS)}.")
    return TASKS[name]


def task_names(written: str) -> list[str]:
    """The tasks that `--task_name` names: one, several with commas between, or `all` for the nine of GLUE.

    Raises:
        ValueError: A name that is unknown, comes twice or has to run alone.
    """
    names = list(BENCHMARK) if written == "all" else written.split(",")
    for name in names:
        get_task(name)
        if names.count(name) > 1:
            raise ValueError(f"--task_name {written} names {name} twice: name each task once.")
        if len(names) > 1 and name not in BENCHMARK:
            raise ValueError(
                f"--task_name {written}: {name} is no part of GLUE's average; run it alone"
                f"{', or give --predict, with which mnli writes AX.tsv' * (name == 'ax')}."
            )
    return names
