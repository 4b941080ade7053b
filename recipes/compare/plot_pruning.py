"""Tables and curves of compared prunings, mean and standard deviation over runs of several seeds.

    python recipes/compare/plot_pruning.py outputs/*-pruned/results.json --output pruning.png

Takes results.json of compare/pruning_glue.py and compare/pruning_lm.py; runs of the same task are averaged, each task
gets a panel. Several draws of random heads (random, random:seed=1, ...) count as one variant. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_attnkit.experiment.comparing.curves import draw, print_tables


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
                f"{path} is not of compare/pruning_glue.py or compare/pruning_lm.py: it has no prune_fractions"
            )
        tasks[run["task"]].append(run)
    for task, runs in tasks.items():
        print_tables(task, runs)
    if arguments.output:
        draw(tasks, arguments.output, arguments.stage)


if __name__ == "__main__":
    main()
