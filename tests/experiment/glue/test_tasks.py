"""The table of tasks."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from hf_attnkit.experiment.glue.data import load_glue
from hf_attnkit.experiment.glue.metric import GlueMetric
from hf_attnkit.experiment.glue.tasks import BENCHMARK, TASKS, get_task

GLUE = [name for name in TASKS if name not in ("ax", "demo")]


def test_the_nine_glue_tasks_the_diagnostic_set_and_the_demo():
    assert " ".join(TASKS) == "cola sst2 mrpc stsb qqp mnli qnli rte wnli ax demo"
    assert list(BENCHMARK) == GLUE
    assert all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize(
    ("name", "columns", "labels", "metrics"),
    [
        ("cola", "sentence", "unacceptable acceptable", "matthews_correlation accuracy"),
        ("sst2", "sentence", "negative positive", "accuracy"),
        ("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
        ("stsb", "sentence1 sentence2", "", "pearson spearmanr"),
        ("qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1"),
        ("mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy"),
        ("qnli", "question sentence", "entailment not_entailment", "accuracy"),
        ("rte", "sentence1 sentence2", "entailment not_entailment", "accuracy"),
        ("wnli", "sentence1 sentence2", "not_entailment entailment", "accuracy"),
        ("ax", "premise hypothesis", "entailment neutral contradiction", ""),
        ("demo", "sentence", "unacceptable acceptable", "matthews_correlation accuracy"),
    ],
)
def test_columns_labels_and_metrics_are_the_hubs(name, columns, labels, metrics):
    task = get_task(name)
    assert task.text_columns == tuple(columns.split())
    assert task.label_names == tuple(labels.split())
    assert task.metrics == tuple(metrics.split())
    assert task.num_labels == (len(labels.split()) or 1)
    assert task.is_regression == (name == "stsb")


@pytest.mark.parametrize("name", GLUE)
def test_rows_of_the_table_are_consistent(name):
    task = TASKS[name]
    assert len(task.tsv.text_fields) == len(task.text_columns)
    assert len(task.tsv.dev_files) == len(task.dev_splits)
    assert (task.tsv.columns is None) == isinstance(task.tsv.label_field, str)
    assert (task.tsv.label_kind == "float") == task.is_regression


def test_a_task_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TASKS["cola"].folder = "elsewhere"


@pytest.mark.parametrize("use", [get_task, load_glue, GlueMetric])
def test_unknown_task_lists_the_known_ones(use):
    with pytest.raises(ValueError, match=r"'colla'.*cola, sst2, mrpc.*wnli, ax, demo"):
        use("colla")
