"""report.html: what a recipe did, on one page that needs nothing else; also in light, in dark, narrow and on paper.

    python -m hf_attnkit.experiment.report.page OUTPUT_DIR

makes it again from the folder alone: results.json, and where they are trainer_state_1.json, ..., control_state.json and
head_importance.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_attnkit.experiment.files import write_text
from hf_attnkit.experiment.report import chart, summary
from hf_attnkit.experiment.report.heat_map import importance_svg
from hf_attnkit.experiment.report.results import public, read_results, without_folders
from hf_attnkit.experiment.report.schema import Results, Stage
from hf_attnkit.experiment.report.stage_table import headline, notes, share_of_control, stage_table, stage_times
from hf_attnkit.experiment.report.template import environment
from hf_attnkit.experiment.report.training_charts import History, curves, entropies, last_step, transfers

ATTENTION = "attention.html"


@dataclass(frozen=True)
class Tile:
    """A number that one should see first."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A round of pruning."""

    title: str
    svg: Markup


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` in one step.

    Raises:
        FileNotFoundError, ValueError: as `read_results`.
    """
    results = read_results(folder)
    states = sorted(folder.glob("trainer_state_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
    named = {f", {number} of {len(states)}" if len(states) > 1 else "": path for number, path in enumerate(states, 1)}
    if (control := folder / "control_state.json").is_file():
        named[" of the control"] = control
    histories = {name: json.loads(path.read_text(encoding="utf-8"))["log_history"] for name, path in named.items()}
    importance = folder / "head_importance.json"
    scores = json.loads(importance.read_text(encoding="utf-8")) if importance.is_file() else None
    seen = (folder / ATTENTION).is_file()
    write_text(folder / "report.html", report_page(results, histories, scores, attention=seen))
    return folder / "report.html"


def report_page(
    results: Mapping[str, Any],
    histories: Mapping[str, History] | None = None,
    importance: Mapping[str, Any] | None = None,
    *,
    attention: bool = False,
) -> str:
    """The page.

    Args:
        results: what results.json holds.
        histories: `log_history` of each training, by what its heading adds to the word training.
        importance: what head_importance.json holds.
        attention: whether attention.html is next to it.

    Raises:
        ValueError: as `read_results`.
    """
    found = public(results)
    stages, timing = found["stages"], found["timing"]
    header, rows = stage_table(stages, timing, found["control"], memory=True)
    logged: dict[str, History] = without_folders(histories or {})
    scored = without_folders(importance) if importance is not None else None
    return environment().get_template("page.html").render(
        size=chart,
        title=summary.title(found),
        happened=summary.happened(found),
        tiles=tiles(found),
        header=header,
        rows=rows,
        notes=notes(stages, timing, memory=True, details="in small numbers"),
        comparison=summary.comparison(found),
        trainings=[
            {
                "name": name,
                "charts": [*curves(history), *transfers(history)],
                "entropies": entropies(history),
                "steps": last_step(history),
            }
            for name, history in logged.items()
        ],
        importance=scored,
        attention=ATTENTION if attention else "",
        heat_maps=heat_maps(scored["rounds"]) if scored else [],
        change=summary.change_facts(found),
        settings=summary.settings(found),
        costs=summary.layer_costs(found),
        branches=summary.branches(found),
        loads={row["where"]: f"{row['verdict']}: {row['why']}" for row in found.get("loads", [])},
        command=summary.command_lines(found["command"]),
        machine={"seed": found["seed"], "device": found["device"], **found["versions"]},
    )  # fmt: skip


def tiles(results: Results) -> list[Tile]:
    """The last stage in large numbers: the task's first metric, and what became smaller."""
    stages, control = results["stages"], results["control"]
    metric = headline(stages)
    if metric is None:
        return []
    of_model = [number for number in range(len(stages)) if number != control]
    first, last = stages[of_model[0]], stages[of_model[-1]]
    value, before = last["metrics"][metric], first["metrics"].get(metric)
    compared = len(of_model) > 1 and before is not None
    made = [Tile(metric, f"{value:.4f}", f"{value - before:+.4f} from {before:.4f}" if compared else last["stage"])]
    if control is not None:
        reference = f"of the control's {stages[control]['metrics'][metric]:.4f}"
        share = share_of_control(stages, control, last)
        made.append(
            Tile("share of control", f"{share:.1%}", reference)
            if share is not None
            else Tile("difference to control", f"{value - stages[control]['metrics'][metric]:+.4f}", reference)
        )
    made += _smaller(first, last)
    time = stage_times(stages, results["timing"])[of_model[-1]]
    if time is not None and compared:
        ratio = time["ratio"]
        quartiles = f"{ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f} of {first['stage']}, quartiles"
        made.append(Tile("time ratio", f"{ratio['median']:.3f}", quartiles))
    return made


def _smaller(first: Stage, last: Stage) -> list[Tile]:
    """What the change made smaller, or larger; heads as the sum over the layers."""
    found = []
    for name, key in (
        ("attention heads", "num_heads"), ("key/value heads", "num_key_value_heads"), ("parameters", "parameters"),
        ("KV cache, bytes/token", "key_value_bytes_per_token"),
    ):  # fmt: skip
        before, now = (sum(value) if isinstance(value := stage.get(key), list) else value for stage in (first, last))
        if key == "num_key_value_heads" and last.get(key) == last.get("num_heads"):
            continue  # each head has its own
        if before and now is not None and now != before:
            found.append(Tile(name, f"{now:,}", f"{now / before - 1:+.1%} from {before:,}"))
    return found


def heat_maps(rounds: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """One for each round of pruning."""
    made = []
    for number, entry in enumerate(rounds, 1):
        removed = {int(layer): heads for layer, heads in entry["removed"].items()}
        gone = sum(len(heads) for heads in removed.values())
        title = f"{f'Round {number}: ' if len(rounds) > 1 else ''}{gone} head{'s' * (gone != 1)} removed"
        columns = max(len(row) for row in entry["scores"])
        scores = np.full((len(entry["scores"]), columns), np.nan)
        for layer, row in enumerate(entry["scores"]):
            scores[layer, : len(row)] = [np.nan if score is None else score for score in row]
        made.append(HeatMap(title, importance_svg(scores, removed, title)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="of a finished run")
    try:
        print(write_report(parser.parse_args().folder))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
