"""The metrics of every task, against arithmetic by hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch

from hf_attnkit.experiment.glue import metric as glue_metric
from hf_attnkit.experiment.glue.demo_data import make_demo_data
from hf_attnkit.experiment.glue.metric import GlueMetric
from hf_attnkit.experiment.glue.tasks import TASKS


def test_every_metric_of_every_task_is_there_and_none_else():
    named = {metric for task in TASKS.values() for metric in task.metrics}
    assert named == set(glue_metric._METRICS)


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        # tp 2, tn 1, fp 1, fn 2: (2*1 - 1*2) / ... = 0; f1 = 2*2 / (2*2 + 1 + 2).
        ("cola", [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1], (0.0, 1 / 2)),
        ("mrpc", [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1], (1 / 2, 4 / 7)),
        # tp 1, tn 1, fp 1, fn 0: (1*1 - 0) / sqrt(2 * 1 * 2 * 1).
        ("demo", [1, 0, 1], [1, 0, 0], (1 / 2, 2 / 3)),
        ("qqp", [1, 0, 1], [1, 0, 0], (2 / 3, 2 / 3)),
        ("sst2", [1, 0, 1], [1, 0, 0], (2 / 3,)),
        ("mnli", [0, 1, 2, 2], [0, 1, 2, 0], (3 / 4,)),
        ("qnli", [0, 1], [0, 0], (1 / 2,)),
        ("rte", [0, 1], [0, 1], (1.0,)),
        ("wnli", [0, 1], [1, 0], (0.0,)),
        # Deviations (-1, 0, 1) and (-4/3, -1/3, 5/3): 3 / sqrt(2 * 42/9); ranks agree.
        ("stsb", [1.5, 2.5, 3.5], [0.0, 1.0, 3.0], (3 / (2 * 42 / 9) ** 0.5, 1.0)),
    ],
)
def test_metrics_against_hand_arithmetic(name, predictions, references, expected):
    result = GlueMetric(name).compute(predictions=predictions, references=references)
    assert list(result) == list(TASKS[name].metrics)
    assert tuple(result.values()) == pytest.approx(expected)
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_batches_give_what_all_at_once_gives(make):
    scores, references = [0.5, 4.75, 2.25, 1.125], [1.0, 5.0, 2.5, 0.0]
    whole = GlueMetric("stsb").compute(predictions=scores, references=references)
    metric = GlueMetric("stsb")
    metric.add_batch(predictions=make(scores[:3]), references=make(references[:3]))
    metric.add(prediction=scores[3], reference=references[3])
    assert metric.compute() == whole
    # It starts afresh after each result.
    other = metric.compute(predictions=[1.0, 2.0, 3.0], references=[3.0, 2.0, 1.0])
    assert other["pearson"] == pytest.approx(-1.0)


def test_constant_predictions_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for references in ([1, 0, 1], [1, 1, 1]):
            result = GlueMetric("cola").compute(predictions=[1, 1, 1], references=references)
            assert result["matthews_correlation"] == 0.0
        for references in ([1, 0], [0, 0]):
            result = GlueMetric("mrpc").compute(predictions=[0, 0], references=references)
            assert result["f1"] == 0.0
        for predictions, references in (([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([1], [2])):
            result = GlueMetric("stsb").compute(predictions=predictions, references=references)
            assert np.isnan([result["pearson"], result["spearmanr"]]).all()


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0.7, 1], [1, 1], r"predictions hold 0\.7, which is none of the class ids \[0, 1\]"),
        ([2, 1], [1, 1], "predictions hold 2"),
        ([1, 1], [1, -1], r"references hold -1.*a labelled split"),
        ([float("nan"), 1], [1, 1], "predictions hold nan"),
        ([[0.1, 0.9]], [1], "don't match the expected format"),
        ([1, 0], [1], "Mismatch in the number"),
        ([], [], r"0 predictions and needs at least 1"),
        (None, None, r"0 predictions and needs at least 1"),
    ],
)
def test_values_that_are_no_class_ids_are_refused(predictions, references, message):
    metric = GlueMetric("cola")
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    # A refusal leaves nothing behind in the metric.
    assert metric.compute(predictions=[1, 0], references=[1, 0])["accuracy"] == 1.0


def test_several_metrics_at_once_do_not_mix():
    metrics = [GlueMetric("cola"), GlueMetric("cola"), GlueMetric("mnli")]
    for step in range(2):
        for i, metric in enumerate(metrics):
            metric.add_batch(predictions=[i, step], references=[i, i])
    accuracies = [metric.compute(references=None)["accuracy"] for metric in metrics]
    assert accuracies == [0.75, 0.75, 0.5]


def digest(data: datasets.DatasetDict) -> str:
    rows = [list(split) for split in data.values()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# evaluate imports Transformers for its pipelines where it can, which takes seconds.
OTHER_PROCESS = """
import hashlib, json, sys
sys.modules["transformers"] = None
import evaluate
del sys.modules["transformers"]
from hf_attnkit.experiment.glue.demo_data import make_demo_data
from hf_attnkit.experiment.glue.metric import GlueMetric
rows = [list(split) for split in make_demo_data().values()]
metric = GlueMetric("cola")
metric.add_batch(predictions=[1, 0], references=[1, 0])
result = metric.compute()
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest(), result["accuracy"])
"""


@pytest.mark.slow
def test_another_process_gives_the_same_data_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = GlueMetric("cola")
    mine.add_batch(predictions=[0, 0], references=[1, 0])
    cache = tmp_path / "cache"
    answer = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS],
        env={**os.environ, "PYTHONHASHSEED": "7", "HF_HOME": str(cache), "HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [digest(make_demo_data()), "1.0"]
    assert mine.compute()["accuracy"] == 0.5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
