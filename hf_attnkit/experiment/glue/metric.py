"""The metrics of each GLUE task (Wang et al. 2018), as an `evaluate.Metric` that needs no network.

`evaluate.load("glue")` fetches a script from the hub; this class is made directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_attnkit.experiment.glue.tasks import get_task


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[0]))


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    # scikit-learn gives 0.0 here too, but warns when both are constant.
    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def _correlation(statistic: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlate(predictions: np.ndarray, references: np.ndarray) -> float:
        # Undefined: scipy warns for constant values and raises for a single one.
        if _is_constant(predictions) or _is_constant(references):
            return float("nan")
        return float(statistic(predictions, references).statistic)

    return correlate


_METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda predictions, references: accuracy_score(references, predictions),
    "f1": lambda predictions, references: f1_score(references, predictions, zero_division=0.0),
    "matthews_correlation": _matthews,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


class GlueMetric(evaluate.Metric):
    """The metrics of one task: `GlueMetric("mrpc").compute(predictions=..., references=...)`.

    Predictions and references are one-dimensional and equally long: class ids (the argmax of the
    logits), or scores for stsb. They may also come in parts through `add_batch` or `add`. The
    result is a dict of floats with the keys of `Task.metrics`, higher = better: accuracy and f1
    (of class 1) from 0 to 1, the correlations from -1 to 1. `matthews_correlation` is 0.0 where
    one side is constant; `pearson` and `spearmanr` are then undefined and come back as nan.

    Everything stays in memory: no file, no lock, so any number of instances and processes can run
    side by side. In a distributed run gather first (`accelerator.gather_for_metrics`).

    Args:
        config_name: A name in `glue_tasks.TASKS`.

    Raises:
        ValueError: An unknown task. By `compute`: nothing to score, or a value that is no class
            id of the task (a fraction, nan, or the -1 of GLUE's unlabelled test split).
    """

    def __init__(self, config_name: str) -> None:
        self._task = get_task(config_name)
        super().__init__(config_name=config_name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        # Class ids travel as floats too: an int64 feature would cut 0.7 to class 0 unnoticed.
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=f"GLUE metrics of {self._task.name}: {', '.join(self._task.metrics)}.",
            citation="Wang et al. 2018, GLUE: A Multi-Task Benchmark and Analysis Platform.",
            inputs_description="predictions, references: class ids, or scores for stsb.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _build_data_dir(self) -> str:
        # The base class makes this folder; nothing here writes into it.
        return str(self._data_dir_root)

    def _finalize(self) -> None:
        if not len(self):
            raise ValueError(
                f"GlueMetric({self._task.name!r}) has 0 predictions and needs at least 1: call "
                "add_batch first, or give predictions= and references= to compute."
            )
        super()._finalize()

    def _compute(self, **inputs: Sequence[float]) -> dict[str, float]:
        arrays = {side: np.asarray(values, dtype=np.float64) for side, values in inputs.items()}
        if not self._task.is_regression:
            for side, values in arrays.items():
                arrays[side] = self._class_ids(side, values)
        return {name: float(_METRICS[name](**arrays)) for name in self._task.metrics}

    def _class_ids(self, side: str, values: np.ndarray) -> np.ndarray:
        allowed = np.arange(self._task.num_labels)
        wrong = values[~np.isin(values, allowed)]
        if len(wrong):
            raise ValueError(
                f"GlueMetric({self._task.name!r}): {side} hold {wrong[0]:g}, which is none of the "
                f"class ids {allowed.tolist()}. Give the argmax of the logits, and references of "
                "a labelled split."
            )
        return values.astype(np.int64)
