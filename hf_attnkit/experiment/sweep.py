"""A recipe on several GLUE tasks and with several seeds: one run after the other, then means and deviations.

`--task_name all --seeds 0 1 2` runs in OUTPUT_DIR/cola/seed-0, OUTPUT_DIR/cola/seed-1, ...; runs that have finished
there are taken over. Tasks are averaged as GLUE does (Wang et al. 2018): a task's score is the mean of its metrics, and
tasks count alike.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table
from transformers import AutoConfig

from hf_attnkit.experiment.arguments import parse_arguments, require_place, underscored
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.glue.data import load_glue, load_test
from hf_attnkit.experiment.glue.splits import needed_splits
from hf_attnkit.experiment.glue.tasks import get_task, task_names
from hf_attnkit.experiment.publishing import versions
from hf_attnkit.experiment.record import command, command_digest
from hf_attnkit.experiment.report.stage_table import label
from hf_attnkit.models.global_reads import expect_global_reads

COSTS = ("work_seconds", "work_peak_memory_bytes", "evaluation_seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class OneRun:
    """A run of the sweep: its place and its own command line, which repeats it alone."""

    task: str
    seed: int
    model: str
    folder: Path
    command: list[str]


def run_each(run: Callable[..., None], *kinds: Any, **options: bool) -> None:
    """Parse the command line, call `run` with the arguments of each of its runs, and sum up where there are several.

    Args:
        run: makes one run; takes what `parse_arguments` returns.
        kinds: the recipe's kinds of arguments, `GlueArguments` first.
        options: `trains` and `saves` of `parse_arguments`.

    Raises:
        ValueError: before the first run, for a finished sweep or a run of another command in the folder, or bad data.
        FileNotFoundError, OSError: before the first run, for data or a model that is not there.
    """
    parsed = parse_arguments(*kinds, **options)  # type: ignore[arg-type]  # flags, by keyword
    arguments, training = parsed[0], parsed[-1]
    tasks = task_names(arguments.task_name)
    if len(tasks) == 1 and arguments.seeds is None:
        arguments.model_name_or_path = _fill(arguments.model_name_or_path, tasks[0], training.seed)
        run(*parsed)
        return
    output = Path(training.output_dir)
    planned = _plan(arguments, training, tasks)
    _require_more(output, planned)
    pending = [one for one in planned if not _is_finished(one)]
    expect_global_reads()
    for one in pending:
        require_place(one.model)
        AutoConfig.from_pretrained(one.model)
    for task in dict.fromkeys(one.task for one in pending):
        if splits := needed_splits(get_task(task), training, parsed):
            load_glue(task, arguments.data_dir, splits)
        if arguments.predict:
            load_test(task, arguments.data_dir)
    for one in pending:
        parsed = parse_arguments(*kinds, argv=one.command[1:], **options)
        parsed[0].command = one.command
        run(*parsed)
        gc.collect()  # a trainer and its model refer to each other
    if training.process_index == 0:
        results = summarize(planned, output)
        write_json(output / "results.json", results)
        print_summary(results)


def _require_more(output: Path, planned: Sequence[OneRun]) -> None:
    """Raise `ValueError` if the folder holds the results of these runs, or of one that is no sweep."""
    file = output / "results.json"
    if not file.exists():
        return
    done = json.loads(file.read_text()).get("runs", [])
    if not done or {str(run.folder.relative_to(output)) for run in planned} <= set(done):
        raise ValueError(f"--output_dir {output} holds a finished run (results.json); name another folder")


def _plan(arguments: Any, training: Any, tasks: Sequence[str]) -> list[OneRun]:
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("task_name", "model_name_or_path", "output_dir", "seed"):
        own.add_argument(f"--{flag}")
    own.add_argument("--seeds", nargs="+")
    own.add_argument("--resume_from_checkpoint", nargs="?", const="true")
    given, rest = own.parse_known_args(underscored(sys.argv[1:]))
    if given.seeds and given.seed:
        raise ValueError(f"--seed {given.seed} has no effect with --seeds; leave one of them out")
    if training.push_to_hub:
        raise ValueError("--push_to_hub pushes one model, and this command makes several; push the one that you choose")
    resume = given.resume_from_checkpoint
    if resume and Path(resume).exists():
        raise ValueError(f"--resume_from_checkpoint {resume} is the checkpoint of one run; this command makes several")
    planned = []
    for task, seed in itertools.product(tasks, arguments.seeds or [training.seed]):
        model = _fill(arguments.model_name_or_path, task, seed)
        folder = Path(training.output_dir) / task / f"seed-{seed}"
        options = {"model_name_or_path": model, "task_name": task, "seed": str(seed), "output_dir": str(folder)}
        argv = [sys.argv[0], *itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())]
        if (folder / "progress.json").is_file() or (resume and folder.is_dir() and any(folder.iterdir())):
            argv += ["--resume_from_checkpoint", resume or "true"]
        planned.append(OneRun(task, seed, model, folder, argv + rest))
    return planned


def _fill(path: str, task: str, seed: int) -> str:
    return path.replace("{task}", task).replace("{seed}", str(seed))


def _is_finished(run: OneRun) -> bool:
    """Whether the folder holds this run's results.

    Raises:
        ValueError: they are another command's.
    """
    file = run.folder / "results.json"
    if not file.exists():
        return False
    results = json.loads(file.read_text())
    if results.get("command_digest") != command_digest(run.command):
        raise ValueError(
            f"{file} is of another command, {results['command']}, and not of {command(run.command)} with the same "
            "folders; name another --output_dir, or move that folder away"
        )
    return True


def summarize(planned: Sequence[OneRun], output: Path) -> dict[str, Any]:
    """Means and sample standard deviations over the seeds: of every metric and cost of every stage, and of GLUE's
    average.

    Args:
        planned: finished runs, equally many stages each.
    """
    found = {(run.task, run.seed): json.loads((run.folder / "results.json").read_text()) for run in planned}
    tasks, seeds = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    stages = []
    for task in tasks:
        for same in zip(*(found[task, seed]["stages"] for seed in seeds), strict=True):
            metrics = {name: _spread([stage["metrics"][name] for stage in same]) for name in same[0]["metrics"]}
            equal = {name: value for name, value in same[0].items() if all(stage.get(name) == value for stage in same)}
            costs = {
                name: _spread([stage[name] for stage in same]) for name in COSTS if all(name in stage for stage in same)
            }
            stages.append({"task": task, **equal, "metrics": metrics, **costs})
    groups = {"average": tasks}
    if "wnli" in tasks:
        groups["average without wnli"] = [task for task in tasks if task != "wnli"]
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    averages = [
        {"stage": stage, "metrics": {name: _average(found, group, seeds, place) for name, group in groups.items()}}
        for place, stage in enumerate(_stage_names(found, tasks, seeds) if groups else [])
    ]
    return {
        "tasks": tasks,
        "seeds": seeds,
        "runs": [str(run.folder.relative_to(output)) for run in planned],
        "stages": stages,
        "averages": averages,
        "command": command(sys.argv),
        "versions": versions(),
    }


def _stage_names(
    found: Mapping[tuple[str, int], Mapping[str, Any]], tasks: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """The names of the stages that every task has; none where tasks have other numbers of them."""
    named = [[label(stage) for stage in found[task, seeds[0]]["stages"]] for task in tasks]
    return named[0] if all(names == named[0] for names in named) else []


def _average(
    found: Mapping[tuple[str, int], Mapping[str, Any]], tasks: Sequence[str], seeds: Sequence[int], place: int
) -> dict[str, float | None]:
    return _spread(
        [fmean(get_task(task).score(found[task, seed]["stages"][place]["metrics"]) for task in tasks) for seed in seeds]
    )


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard deviation of a sample (n - 1); `None` for a single value, and where a value is not finite."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return {"mean": fmean(values), "std": stdev(values) if known else None}


def print_summary(results: Mapping[str, Any]) -> None:
    """One row for every metric of every stage of every task, then the averages."""
    seeds = ", ".join(map(str, results["seeds"]))
    table = Table(title=f"mean and sample standard deviation over seeds {seeds}; dev sets")
    for name in ("task", "stage", "metric"):
        table.add_column(name)
    for name in ("mean", "std", "key/value heads"):
        table.add_column(name, justify="right")
    rows = [(stage["task"], stage) for stage in results["stages"]]
    rows += [(f"{len(results['tasks'])} tasks", stage) for stage in results["averages"]]
    for task, stage in rows:
        heads = sum(stage.get("num_key_value_heads", []))
        for name, value in stage["metrics"].items():
            std = "" if value["std"] is None else f"{value['std']:.4f}"
            table.add_row(task, label(stage), name, f"{value['mean']:.4f}", std, str(heads or ""))
    show(table)
