"""Which splits of a task a run reads: nothing has to be there that is not used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import IntervalStrategy, TrainingArguments

from hf_attnkit.experiment.glue.tasks import Task


def needed_splits(task: Task, training: TrainingArguments, arguments: Iterable[Any]) -> list[str]:
    """The labelled splits that are read: training data to train on or to calibrate on, dev data to measure on.

    Args:
        arguments: all of the recipe's; those of a change that looks at training data have `reads_training_data`.
    """
    if not task.is_labelled:
        return []
    reads = training.do_train or any(getattr(group, "reads_training_data", False) for group in arguments)
    measures = training.do_eval or training.eval_strategy != IntervalStrategy.NO
    return [*(["train"] if reads else []), *(task.dev_splits if measures else ())]
