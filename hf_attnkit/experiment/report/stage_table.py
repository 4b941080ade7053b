"""The stages of a run as a table, with differences to the first stage: the same on the console, the page and the card.

What other work on the machine decides, such as seconds, is not in it: the time is the ratio that was measured
alternately.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attnkit.experiment.report.schema import StageTime, Timing

Stage = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A number, and in brackets or small: its difference to the first stage, or its quartiles."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.detail})" if self.detail else self.text


@dataclass(frozen=True)
class Column:
    """A name, and a cell for each stage."""

    name: str
    cells: list[Cell]


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


def headline(stages: Sequence[Stage]) -> str | None:
    """The metric that stands for the others: the task's first."""
    return next(iter(stages[0]["metrics"]), None) if stages else None


def share_of_control(stages: Sequence[Stage], control: int | None, stage: Stage) -> float | None:
    """The first metric divided by the control's; `None` where there is no control, or no share since one is not above
    0."""
    metric = headline(stages)
    if control is None or metric is None:
        return None
    value, whole = (found["metrics"].get(metric, math.nan) for found in (stage, stages[control]))
    return value / whole if whole > 0 and value >= 0 else None


def stage_times(stages: Sequence[Stage], timing: Timing | None) -> list[StageTime | None]:
    """The time of each stage; a stage of a round that was not timed has none."""
    left = list(timing["stages"]) if timing else []
    found: list[StageTime | None] = []
    for stage in stages:
        # A timing that does not tell rounds apart is in the order of the stages.
        mine = next((time for time in left if label(time) in (label(stage), stage["stage"])), None)
        found.append(mine)
        if mine is not None:
            left.remove(mine)
    return found


def stage_table(
    stages: Sequence[Stage], timing: Timing | None = None, control: int | None = None, memory: bool = False
) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows. What no stage has is no column, nor are key/value heads where every head has its own.

    Args:
        control: number of the stage of the untouched model, trained as long.
        memory: with columns for the peaks of memory, which a page has room for.
    """
    if not stages:
        return [], []

    def of(key: str) -> list[Any]:
        return [stage.get(key) for stage in stages]

    names = dict.fromkeys(name for stage in stages for name in stage["metrics"])
    columns = [_column(name, [stage["metrics"].get(name) for stage in stages], "{:.4f}".format, _by) for name in names]
    if control is not None:
        shares = [share_of_control(stages, control, stage) for stage in stages]
        columns.append(_column("share of control", shares, "{:.1%}".format))
    columns.append(_column("heads", of("num_heads"), heads))
    if of("num_key_value_heads") != of("num_heads"):
        columns.append(_column("key/value heads", of("num_key_value_heads"), heads))
    columns.append(_column("parameters", of("parameters"), "{:,}".format, _share))
    columns.append(_column("file MiB", of("file_bytes"), lambda size: f"{size / 2**20:,.1f}", _share))
    columns.append(_column("KV bytes/token", of("key_value_bytes_per_token"), "{:,}".format, _share))
    columns.append(Column("time ratio", [_ratio(time) for time in stage_times(stages, timing)]))
    if memory:
        columns.append(_column("peak MiB", of("peak_memory_bytes"), _mebibytes))
        columns.append(_column("work peak MiB", of("work_peak_memory_bytes"), _mebibytes))
    columns = [column for column in columns if any(cell.text for cell in column.cells)]
    rows = zip(*(column.cells for column in columns), strict=True)
    return ["stage", *(column.name for column in columns)], [
        [Cell(label(stage)), *row] for stage, row in zip(stages, rows, strict=True)
    ]


def notes(
    stages: Sequence[Stage], timing: Timing | None = None, memory: bool = False, details: str = "in brackets"
) -> list[str]:
    """What the table's numbers are of, a sentence each.

    Args:
        details: how the table shows the details of its cells.
    """
    found = [f"{details.capitalize()}: the difference to the first stage."] if len(stages) > 1 else []
    if headline(stages) == "perplexity":
        found.append("Perplexity: lower is better.")
    if timing and timing["stages"]:
        first = timing["stages"][0]
        found.append(
            f"Time ratio: a forward pass divided by that of the stage {first['stage']}, the median and {details} the "
            f"quartiles of {timing['repeats']:,} repeats. The stages were timed alternately on {timing['device']}, "
            f"{timing['batch_size']:,} x {timing['sequence_length']:,} tokens; the first took "
            f"{first['milliseconds']['median']:,.1f} ms."
        )
    if memory and stages and (of := stages[-1].get("peak_memory_of")):
        found.append(
            f"Peak MiB: {of}, during the evaluation. Work peak MiB: the same before it (loading, the change or "
            "training)."
        )
    return found


def _column(
    name: str,
    values: Sequence[Any],
    write: Callable[[Any], str],
    compare: Callable[[float, float], str] | None = None,
) -> Column:
    """Values written out, an absent one as nothing, and compared with the first."""
    cells = []
    for place, value in enumerate(values):
        detail = ""
        if compare is not None and place > 0 and value is not None and values[0] is not None:
            detail = compare(value, values[0])
        cells.append(Cell("" if value is None else write(value), detail))
    return Column(name, cells)


def _by(now: float, before: float) -> str:
    difference = now - before
    return f"{difference:+.4f}" if math.isfinite(difference) else ""


def _share(now: float, before: float) -> str:
    return f"{now / before - 1:+.1%}" if before and now != before else ""


def _ratio(time: StageTime | None) -> Cell:
    if time is None:
        return Cell("")
    ratio = time["ratio"]
    if ratio["lower_quartile"] == ratio["upper_quartile"] == ratio["median"] == 1:  # the first stage by itself
        return Cell("1")
    return Cell(f"{ratio['median']:.3f}", f"{ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"
