"""Tables and curves of compared prunings, mean and standard deviation over runs of several seeds.

    python recipes/compare/plot_pruning.py outputs/*-pruned/results.json --output pruning.png

Takes results.json of compare_pruning_glue.py and compare_pruning_lm.py; runs of the same task are averaged, each task
gets a panel. Several draws of random heads (random, random:seed=1, ...) count as one variant. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# (stage, refit) -> variant -> fraction -> the metric in each run
Curves = dict[tuple[str, str], dict[str, dict[float, list[float]]]]
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b"]  # apart for the colour-blind
MARKERS = ["o", "^", "s", "v"]


def name_of(variant: str) -> str:
    """Draws of random heads are one variant."""
    return "random" if variant.startswith("random") else variant


def gather(runs: Iterable[Mapping[str, Any]]) -> tuple[Curves, dict[str, list[float]]]:
    """The runs of one task: what was measured, and the untouched model's metric, as it was and trained as long."""
    curves: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    untouched: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        metric = metric_of(run)
        for stage in run["stages"]:
            value, kind = stage["metrics"][metric], stage["stage"].replace("baseline", "changed")
            if "variant" in stage:
                curves[kind, stage["refit"]][name_of(stage["variant"])][stage["prune_fraction"]].append(value)
            else:
                untouched[kind].append(value)
    return curves, untouched


def metric_of(run: Mapping[str, Any]) -> str:
    return next(iter(run["stages"][0]["metrics"]))


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`, of a single value itself."""
    return f"{mean(values):.4g}" if len(values) == 1 else f"{mean(values):.3f} ± {stdev(values):.3f}"


def print_tables(task: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """For each stage and refit a Markdown table."""
    curves, untouched = gather(runs)
    for (stage, refit), variants in curves.items():
        before = spread(untouched[stage]) if untouched[stage] else "not measured"
        print(f"\n**{task}, {metric_of(runs[0])}, {stage}, refit {refit}**; untouched model {before}\n")
        fractions = sorted({fraction for values in variants.values() for fraction in values})
        print("| heads removed |", " | ".join(f"{fraction:.0%}" for fraction in fractions), "|")
        print("| --- |" + " --- |" * len(fractions))
        for variant, values in variants.items():
            cells = [spread(values[fraction]) if fraction in values else "" for fraction in fractions]
            print(f"| `{variant}` | " + " | ".join(cells) + " |")


def draw(tasks: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, stage: str) -> None:
    """Curves of one stage: a column for each task, a row for each refit, a colour and marker for each variant."""
    gathered = {task: gather(runs) for task, runs in tasks.items()}
    refits = list(dict.fromkeys(refit for curves, _ in gathered.values() for kind, refit in curves if kind == stage))
    names = list(dict.fromkeys(name for curves, _ in gathered.values() for found in curves.values() for name in found))
    coloured = [name for name in names if name != "random"]
    styles = {name: {"color": PALETTE[n % len(PALETTE)], "marker": MARKERS[n // len(PALETTE) % len(MARKERS)]}
              for n, name in enumerate(coloured)}  # fmt: skip
    styles["random"] = {"color": "black", "linewidth": 2.6}
    rows, columns = len(refits), len(tasks)
    size = (max(5.0 * columns, 7.0), 3.9 * rows + 1.6)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey="col"
    )
    for column, (task, (curves, untouched)) in enumerate(gathered.items()):
        for row, refit in enumerate(refits):
            axis = axes[row][column]
            for name, values in curves.get((stage, refit), {}).items():
                x = sorted(values)
                y = [mean(values[fraction]) for fraction in x]
                percent = [100 * fraction for fraction in x]
                axis.plot(percent, y, **{"linewidth": 1.3, "markersize": 4} | styles[name])
                if name == "random" and len(values[x[0]]) > 1:
                    errors = [stdev(values[fraction]) for fraction in x]
                    low, high = ([a + sign * e for a, e in zip(y, errors, strict=True)] for sign in (-1, 1))
                    axis.fill_between(percent, low, high, color="black", alpha=0.12, linewidth=0)
            if untouched[stage]:
                axis.axhline(mean(untouched[stage]), color="grey", linestyle="dashed")
            metric = metric_of(tasks[task][0])
            if metric == "perplexity":
                axis.set_yscale("log")
            axis.set(title=f"{task}, refit {refit}", ylabel=metric)
            axis.grid(alpha=0.25)
            if row == rows - 1:
                axis.set_xlabel("% of the heads removed")
    lines = [plt.Line2D([], [], label=name, **styles[name]) for name in names]
    lines += [plt.Line2D([], [], color="grey", linestyle="dashed", label="untouched model")]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json files")
    parser.add_argument("--output", type=Path, help="PNG to draw the curves into")
    parser.add_argument("--stage", default="changed", choices=["changed", "recovered"], help="the stage to draw")
    arguments = parser.parse_args()
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in arguments.results:
        run = json.loads(path.read_text())
        if "prune_fractions" not in run:
            parser.error(
                f"{path} is not of compare_pruning_glue.py or compare_pruning_lm.py: it has no prune_fractions"
            )
        tasks[run["task"]].append(run)
    for task, runs in tasks.items():
        print_tables(task, runs)
    if arguments.output:
        draw(tasks, arguments.output, arguments.stage)


if __name__ == "__main__":
    main()
