"""Train the same model by a plain `Trainer` and by a recipe's run, and compare their steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_attnkit.experiment.arguments import ENTROPY_EVERY_N_STEPS, RunArguments
from hf_attnkit.experiment.benchmarking.measure import quartiles
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.training.train import entropy_callbacks

VOCABULARY = 1000
STEPS = ENTROPY_EVERY_N_STEPS + 1  # the first is not counted, one of the others measures
PLAIN, WITHOUT, DEFAULT = "plain Trainer", "recipe, no entropies", "recipe"


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Random tokens and labels."""

    def __init__(self, number: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (number, length), generator=generator)
        self.labels = torch.randint(2, (number,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


class RandomRun(Run):
    """A recipe's run on random sentences, which nothing measures."""

    def __init__(self, arguments: Any, training: TrainingArguments, model: Any, data: Sentences) -> None:
        super().__init__(arguments, training)
        self.model, self.tokenizer, self.train_data, self.eval_data = model, None, data, data

    def load_model(self, path: str) -> Any:
        raise NotImplementedError("this benchmark changes no model")

    def calibration_batches(self, size: int) -> list[Any]:
        return []

    def trainer_options(self) -> dict[str, Any]:
        return {"data_collator": default_data_collator}

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        raise NotImplementedError("this benchmark trains and does not evaluate")


@dataclass
class Clock(TrainerCallback):
    """Seconds from the end of each step to the end of the next, everything between them included.

    It has to be the last of the callbacks, so that what the others do at a step's end is in that step's time.
    """

    seconds: list[float] = field(default_factory=list)
    last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def timed(callback: Any, seconds: list[float]) -> Any:
    """The callback of entropies, which adds each measurement's seconds."""
    measure = callback._measure

    def measure_timed(*args: Any) -> Any:
        start = time.perf_counter()
        found = measure(*args)
        seconds.append(time.perf_counter() - start)
        return found

    callback._measure = measure_timed
    return callback


def turn(
    kind: str, training: TrainingArguments, data: Sentences, shape: dict[str, int], measurements: list[float]
) -> list[float]:
    """Seconds of each step but the first, from the same weights each time.

    Args:
        measurements: seconds of each measurement of entropies are added to it.
    """
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape))
    clock = Clock()
    if kind == PLAIN:
        options = {"train_dataset": data, "eval_dataset": data, "data_collator": default_data_collator}
        Trainer(model=model, args=training, callbacks=[clock], **options).train()
        return clock.seconds
    run = RandomRun(RunArguments(entropy_every_n_steps=0 if kind == WITHOUT else None), training, model, data)
    asked = run.arguments.entropy_every_n_steps
    own = [timed(callback, measurements) for callback in entropy_callbacks(run.trainer(), asked)]
    run.train(callbacks=[*own, clock])
    run.progress.remove()  # the next turn is a run of its own
    return clock.seconds


def summary(found: dict[str, list[list[float]]], measurements: list[float]) -> dict[str, Any]:
    """Medians, quartiles and overheads.

    Args:
        found: seconds of each step, of each turn, of each kind.
        measurements: seconds of each measurement of entropies.
    """
    rows: dict[str, dict[str, Any]] = {}
    plain = [median(seconds) for seconds in found[PLAIN]]
    steps = {kind: [step for seconds in turns for step in seconds] for kind, turns in found.items()}
    for kind, turns in found.items():
        low, middle, high = quartiles(steps[kind])
        ratios = [median(seconds) / base for seconds, base in zip(turns, plain, strict=True)]
        rows[kind] = {
            "step_seconds": middle,
            "step_quartiles": [low, high],
            "ratio": middle / median(steps[PLAIN]),
            "ratio_quartiles": [quartiles(ratios)[0], quartiles(ratios)[2]],
        }
    low, middle, high = quartiles(measurements)
    share = middle / (ENTROPY_EVERY_N_STEPS * rows[DEFAULT]["step_seconds"])
    return {
        "rows": rows,
        "measurement_seconds": middle,
        "measurement_quartiles": [low, high],
        "entropy_overhead": share,
        # The median step has no measurement in it.
        "overhead": rows[DEFAULT]["ratio"] - 1 + share,
    }
