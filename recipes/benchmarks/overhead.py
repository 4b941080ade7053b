"""What a recipe costs over a plain `Trainer`: the same BERT, data and arguments, trained by each in turns.

    OMP_NUM_THREADS=1 python recipes/benchmarks/overhead.py --output_file outputs/overhead.json

A turn trains 101 steps anew from the same weights: by `transformers.Trainer` itself, by `Run.train` without entropies,
and by `Run.train` as it is by default; a round is one turn of each, and each round begins with another. Reported: the
median step and its quartiles, the ratio of medians to the plain trainer and the quartiles of the rounds' ratios; and
apart, what one measurement of `AttentionEntropyCallback` takes and, at its default interval of 100 steps, which share
of a step that is. The first step of a turn is not counted: it fills allocators, and the callback's first measurement
comes with it, which is one a run and not one in 100 steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_attnkit.experiment.benchmarking.measure import quartiles
from hf_attnkit.experiment.costs import machine
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.run import ENTROPY_EVERY_N_STEPS, Run, RunArguments

VOCABULARY = 1000
STEPS = ENTROPY_EVERY_N_STEPS + 1  # the first is not counted, one of the others measures
PLAIN, WITHOUT, DEFAULT = "plain Trainer", "recipe, no entropies", "recipe"


class Sentences(Dataset):
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

    def calibration_batches(self, size: int) -> list:
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
    """Train anew; seconds of each step but the first. Those of each measurement of entropies are added to the list."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape))
    clock = Clock()
    if kind == PLAIN:
        options = {"train_dataset": data, "eval_dataset": data, "data_collator": default_data_collator}
        Trainer(model=model, args=training, callbacks=[clock], **options).train()
        return clock.seconds
    run = RandomRun(RunArguments(entropy_every_n_steps=0 if kind == WITHOUT else None), training, model, data)
    own = [timed(callback, measurements) for callback in run.callbacks()]
    run.callbacks = lambda: [*own, clock]
    run.train()
    run.progress.remove()  # the next turn is a run of its own
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="rounds; each trains both models")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a model in a round")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--output_file", type=Path, help="JSON of all measurements")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < STEPS:
        parser.error(f"--rounds must be at least 1, and --steps at least {STEPS}, in which one measurement is counted")

    shape = {
        "hidden_size": options.hidden_size, "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
    }  # fmt: skip
    data = Sentences(options.batch_size * options.steps, options.length)
    kinds = [PLAIN, WITHOUT, DEFAULT]
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    measurements: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder, per_device_train_batch_size=options.batch_size, max_steps=options.steps, report_to="none",
            save_strategy="no", disable_tqdm=True, do_train=True, logging_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        for number in range(options.rounds):
            first = number % len(kinds)
            for kind in kinds[first:] + kinds[:first]:
                found[kind].append(turn(kind, training, data, shape, measurements))
        where = machine(training)
    report = summary(found, measurements)
    print_summary(report, f"{where}, torch {torch.__version__}, {options.batch_size} x {options.length} tokens a step")
    if options.output_file:
        arguments = {name: value for name, value in vars(options).items() if name != "output_file"}
        write_json(options.output_file, {"arguments": arguments, "device": where, **report, "seconds": found})
    else:
        print(json.dumps(report))


def summary(found: dict[str, list[list[float]]], measurements: list[float]) -> dict[str, Any]:
    """Medians, quartiles and overheads.

    Args:
        found: seconds of each step, of each turn, of each kind.
        measurements: seconds of each measurement of entropies.
    """
    rows = {}
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


def print_summary(report: dict[str, Any], where: str) -> None:
    """The table, and the two overheads in a sentence each."""
    table = Table(title=f"training step: {where}")
    for name in ("", "ms, median", "quartiles", "of plain", "rounds' quartiles"):
        table.add_column(name, justify="right" if name else "left")
    for kind, row in report["rows"].items():
        low, high = row["step_quartiles"]
        first, third = row["ratio_quartiles"]
        table.add_row(kind, f"{1e3 * row['step_seconds']:.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                      f"{row['ratio']:.4f}", f"{first:.4f} to {third:.4f}")  # fmt: skip
    show(table)
    low, high = report["measurement_quartiles"]
    print(
        f"one measurement of entropies: {1e3 * report['measurement_seconds']:.1f} ms ({1e3 * low:.1f} to "
        f"{1e3 * high:.1f}), every {ENTROPY_EVERY_N_STEPS} steps: {report['entropy_overhead']:.2%}\n"
        f"recipe over plain Trainer, measurements included: {report['overhead']:+.2%}"
    )


if __name__ == "__main__":
    main()
