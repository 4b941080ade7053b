"""Predictions in the form that the GLUE server (Wang et al. 2018) takes: a TSV file for each test split.

The columns are `index`, from 0 in the order of the test split, and `prediction`.
Classes are written as the task's own TSV files write them: by name for mnli, ax, qnli and rte, otherwise by number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf_attnkit.experiment.files import write_text
from hf_attnkit.experiment.glue.tasks import Task


def write_predictions(path: Path, task: Task, answers: np.ndarray) -> None:
    """Write one file, whole or not at all.

    Args:
        answers: `(examples,)`, in the order of the test split: GLUE's class ids, or scores, which are clipped to
            the range of stsb, 0 to 5.
    """
    if task.is_regression:
        written = [f"{score:.3f}" for score in np.clip(answers, 0.0, 5.0)]
    elif task.layout.label_kind == "word":
        written = [task.label_names[answer] for answer in answers]
    else:
        written = [str(answer) for answer in answers]
    rows = [f"{index}\t{answer}" for index, answer in enumerate(written)]
    write_text(path, "\n".join(["index\tprediction", *rows]) + "\n")
