"""The stages of a run as a table, and each number's difference to the first stage: for every place that shows them."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Stage = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """What stands in the table, and the difference to the first stage, or nothing."""

    text: str
    difference: str = ""


@dataclass(frozen=True)
class _Column:
    """Where a column's value stands in a stage, how it is written, and how its difference is."""

    name: str
    value: Callable[[Stage], Any]
    write: Callable[[Any], str]
    compare: Callable[[float, float], str] | None = None


def label(stage: Stage) -> str:
    """A stage's name, with what tells it from others of that name: a round, or the change that is compared."""
    parts = [str(stage[name]) for name in ("stage", "variant") if name in stage]
    return ", ".join(
        [*parts, *(f"{name} {stage[name]}" for name in ("round", "refit", "prune_fraction") if name in stage)]
    )


def model_name(path: str) -> str:
    """What a title calls a model: its folder's name, and for one seed of several runs also the run's and the task's."""
    parts = Path(path).parts
    return "-".join(parts[-3:] if re.fullmatch(r"seed-\d+", parts[-1]) else parts[-1:])


def heads(per_layer: Sequence[int]) -> str:
    """`6 x 12` for six equal layers, otherwise each layer's number."""
    runs = [(number, len(list(run))) for number, run in itertools.groupby(per_layer)]
    return f"{runs[0][1]} x {runs[0][0]}" if len(runs) == 1 else " ".join(str(number) for number in per_layer)


def _by(now: float, before: float) -> str:
    difference = now - before
    return f"{difference:+.4f}" if math.isfinite(difference) else ""


def _share(now: float, before: float) -> str:
    return f"{now / before - 1:+.1%}" if before and now != before else ""


_COSTS = (
    _Column("heads", lambda stage: stage.get("num_heads"), heads),
    _Column("key/value heads", lambda stage: stage.get("num_key_value_heads"), heads),
    _Column("parameters", lambda stage: stage.get("parameters"), "{:,}".format, _share),
    _Column("KV bytes/token", lambda stage: stage.get("key_value_bytes_per_token"), "{:,}".format, _share),
    _Column("ms/batch", lambda stage: stage.get("seconds_per_batch"), lambda s: f"{1e3 * s:.1f}", _share),
    _Column("peak MiB", lambda stage: stage.get("peak_memory_bytes"), lambda size: f"{size / 2**20:,.0f}"),
    _Column("work seconds", lambda stage: stage.get("work_seconds"), "{:,.1f}".format),
    _Column("work peak MiB", lambda stage: stage.get("work_peak_memory_bytes"), lambda size: f"{size / 2**20:,.0f}"),
)  # fmt: skip


def stage_table(stages: Sequence[Stage]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows; what no stage has is no column, nor are key/value heads where every head has its own."""
    metrics = list(stages[0]["metrics"]) if stages else []
    columns = [
        _Column(name, lambda stage, name=name: stage["metrics"].get(name), "{:.4f}".format, _by) for name in metrics
    ]
    columns += [column for column in _COSTS if any(column.value(stage) is not None for stage in stages)]
    if all(stage.get("num_key_value_heads") == stage.get("num_heads") for stage in stages):
        columns = [column for column in columns if column.name != "key/value heads"]
    rows = [[Cell(label(stage)), *(_cell(column, stage, stages[0]) for column in columns)] for stage in stages]
    return ["stage", *(column.name for column in columns)], rows


def _cell(column: _Column, stage: Stage, first: Stage) -> Cell:
    value, before = column.value(stage), column.value(first)
    if value is None:
        return Cell("")
    comparable = column.compare is not None and before is not None and stage is not first
    return Cell(column.write(value), column.compare(value, before) if comparable else "")


def notes(stages: Sequence[Stage]) -> str:
    """What the table's costs are of."""
    found = []
    if timed := stages[-1].get("timed_batches"):
        shape = " x ".join(map(str, timed["shape"]))
        found.append(
            f"ms/batch: median forward pass over {timed['number']} batches, the largest of {shape} tokens; "
            "stages are timed one after another, so other work on the machine shows."
        )
    if of := stages[-1].get("peak_memory_of"):
        found.append(
            f"Peak MiB: {of}, during the evaluation; work is what was done between the one before and it: loading, the "
            "change, or training."
        )
    return " ".join(found)


def command_lines(command: str) -> str:
    """A command line with a line for each flag, as a shell reads it."""
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


# What results.json holds for every run; the rest are the recipe's own settings.
COMMON = ("task", "data", "dataset", "model", "stages", "train_samples", "seed", "device", "command", "versions")


def settings(results: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's own settings, written out; those that are off or empty are left out."""
    found = {name: value for name, value in results.items() if name not in COMMON}
    return {name: _written(value) for name, value in found.items() if value not in (None, False, [], {})}


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_written(part)}" for name, part in value.items())
    if not isinstance(value, list):
        return str(value)
    runs = [(str(part), len(list(run))) for part, run in itertools.groupby(value)]
    return ", ".join(part if number == 1 else f"{number} x {part}" for part, number in runs)
