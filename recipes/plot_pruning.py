"""Tables and curves of compared prunings, mean and standard deviation over runs of several seeds.

    python recipes/plot_pruning.py outputs/*-pruned/results.json --output pruning.png

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
DASHES = {"none": (0, (2, 2)), "scale": (0, (5, 1, 1, 1)), "output": "solid"}


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
    """Curves of one stage: a panel for each task, a colour for each variant, a dash for each refit."""
    gathered = {task: gather(runs) for task, runs in tasks.items()}
    names = list(dict.fromkeys(name for curves, _ in gathered.values() for found in curves.values() for name in found))
    palette = plt.get_cmap("tab20").colors
    colours = {name: "black" if name == "random" else palette[index % 20] for index, name in enumerate(names)}
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 5.2), squeeze=False, layout="constrained")
    for axis, (task, (curves, untouched)) in zip(axes[0], gathered.items(), strict=True):
        for (kind, refit), variants in curves.items():
            if kind != stage:
                continue
            for name, values in variants.items():
                x = sorted(values)
                y = [mean(values[fraction]) for fraction in x]
                errors = [stdev(values[fraction]) if len(values[fraction]) > 1 else 0.0 for fraction in x]
                low, high = ([a + sign * e for a, e in zip(y, errors, strict=True)] for sign in (-1, 1))
                percent = [100 * fraction for fraction in x]
                width = 2.6 if name == "random" else 1.5
                axis.plot(percent, y, color=colours[name], linestyle=DASHES[refit], linewidth=width)
                if refit != "none":
                    axis.fill_between(percent, low, high, color=colours[name], alpha=0.1, linewidth=0)
        if untouched[stage]:
            axis.axhline(mean(untouched[stage]), color="grey", linewidth=1)
        metric = metric_of(tasks[task][0])
        if metric == "perplexity":
            axis.set_yscale("log")
        axis.set(title=task, xlabel="% of the heads removed", ylabel=metric)
        axis.grid(alpha=0.25)
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    refits = dict.fromkeys(refit for curves, _ in gathered.values() for kind, refit in curves if kind == stage)
    lines += [plt.Line2D([], [], color="grey", linestyle=DASHES[refit], label=f"refit {refit}") for refit in refits]
    lines += [plt.Line2D([], [], color="grey", linewidth=1, label="untouched model")]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 3 * len(tasks)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json files")
    parser.add_argument("--output", type=Path, help="PNG to draw the curves into")
    parser.add_argument("--stage", default="changed", choices=["changed", "recovered"], help="which to draw")
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
