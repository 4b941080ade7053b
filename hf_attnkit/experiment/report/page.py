"""report.html: what a recipe did, on one page that needs nothing else; also in light, in dark, narrow and on paper.

    python -m hf_attnkit.experiment.report.page OUTPUT_DIR

makes it again from the folder alone: results.json, and where they are trainer_state_1.json, ... and
head_importance.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_attnkit.experiment.files import write_text
from hf_attnkit.experiment.report.stage_table import Cell, command_lines, model_name, notes, settings, stage_table
from hf_attnkit.experiment.report.svg_chart import Line, heat_map, line_chart

STYLE = Path(__file__).with_name("page.css")
ENTROPY = re.compile(r"attention_entropy/layer_(\d+)/(mean|min)")
# Of an evaluation's log: how fast it was, which is no curve of training.
_SPEED = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
_LEGEND = 12  # layers of which each stands in the legend


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` in one step.

    Raises:
        FileNotFoundError: if the folder has no results.json.
    """
    results = json.loads((folder / "results.json").read_text())
    states = sorted(folder.glob("trainer_state_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
    histories = [json.loads(path.read_text())["log_history"] for path in states]
    importance = folder / "head_importance.json"
    page = report_page(results, histories, json.loads(importance.read_text()) if importance.is_file() else None)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def report_page(
    results: Mapping[str, Any],
    histories: Sequence[Sequence[Mapping[str, float]]] = (),
    importance: Mapping[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        results: what results.json holds.
        histories: `log_history` of each training.
        importance: what head_importance.json holds.
    """
    title = f"{results['task']}: {model_name(results['model'])}"
    header, rows = stage_table(results["stages"])
    sections = [
        f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(results['data'])}. "
        f"Started from <code>{escape(results['model'])}</code>.</p>{_tiles(header, rows)}</header>",
        _section("Stages", _stages(header, rows, results["stages"])),
    ]
    for number, history in enumerate(histories, 1):
        which = f", {number} of {len(histories)}" if len(histories) > 1 else ""
        sections.append(_section(f"Training{which}", _curves(history)))
        sections.append(_section(f"Attention entropy while training{which}", _entropies(history)))
    if importance is not None:
        sections.append(_section("Head importance", _importance(importance)))
    sections.append(_section("Settings", _facts(settings(results))))
    sections.append(_section("Repeat it", _repeat(results)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n<footer>Made by <code>hf_attnkit.experiment.report.page</code> of hf_attnkit from results.json.</footer>\n"
        "</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _tiles(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The last stage in large numbers: the task's first metric, and what became smaller."""
    if not rows:
        return ""
    shown = [1, *(i for i, name in enumerate(header) if name in ("parameters", "KV bytes/token", "ms/batch"))]
    tiles = []
    for place in shown:
        first, last = rows[0][place], rows[-1][place]
        before = f"<small>{_minus(last.difference)} from {_minus(first.text)}</small>" if last.difference else ""
        tiles.append(f"<div class='tile'><dt>{escape(header[place])}</dt><dd>{_minus(last.text)}{before}</dd></div>")
    return f"<dl class='tiles'>{''.join(tiles)}</dl>"


def _stages(header: Sequence[str], rows: Sequence[Sequence[Cell]], stages: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p class='note'>Nothing was measured: the run was <code>--do_train</code> alone.</p>"
    head = "".join(f"<th scope='col'>{escape(name).replace('_', '_<wbr>')}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{_minus(cell.text)}{f'<small>{_minus(cell.difference)}</small>' if cell.difference else ''}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return (
        "<div class='scroll panel' role='region' aria-label='Stages' tabindex='0'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p class='note'>Small numbers: difference to the first stage. {escape(notes(stages))}</p>"
    )


def _points(history: Iterable[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    """Loss, learning rate, and every metric that was evaluated during training."""
    charts = []
    losses = {"training": "loss", "evaluation": "eval_loss"}
    lines = [Line(name, points) for name, key in losses.items() if (points := _points(history, key))]
    if lines:
        charts.append(line_chart("Loss", "loss", lines))
    if rates := _points(history, "learning_rate"):
        charts.append(line_chart("Learning rate", "learning rate", [Line("learning rate", rates)]))
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith("eval_"))
    metrics = [key for key in keys if key != "eval_loss" and not _SPEED.search(key)]
    for key in metrics:
        name = key.removeprefix("eval_")
        charts.append(line_chart(f"{name}, evaluated while training", name, [Line(name, _points(history, key))]))
    if charts:
        return f"<div class='charts'>{''.join(charts)}</div>"
    steps = max((entry["step"] for entry in history), default=0)
    return (
        f"<p class='note'>Nothing was logged in {steps:,} steps; <code>--logging_steps</code> says how often the loss "
        "is, <code>--eval_strategy steps</code> how often the metrics are.</p>"
    )


def _entropies(history: Sequence[Mapping[str, float]]) -> str:
    found: dict[str, dict[int, str]] = {"mean": {}, "min": {}}
    for entry in history:
        for key in entry:
            if match := ENTROPY.fullmatch(key):
                found[match[2]].setdefault(int(match[1]), key)
    if not found["mean"]:
        return ""
    charts = []
    for kind, title in (("mean", "Mean over a layer's heads"), ("min", "The layer's most focused head")):
        layers = sorted(found[kind])
        lines = [
            Line(f"layer {layer}", _points(history, found[kind][layer]), place / max(len(layers) - 1, 1))
            for place, layer in enumerate(layers)
        ]
        charts.append(line_chart(title, "share of ln(visible keys)", lines, legend=_spread(len(lines))))
    return (
        f"<div class='charts'>{''.join(charts)}</div><p class='note'>Entropy of the same tokens each time, as a share "
        "of that of uniform attention: 1 looks at all keys alike, 0 at one.</p>"
    )


def _spread(number: int) -> set[int]:
    """Which lines stand in the legend: all, or of many some, first and last among them."""
    if number <= _LEGEND:
        return set(range(number))
    return {round(i * (number - 1) / 5) for i in range(6)}


def _importance(saved: Mapping[str, Any]) -> str:
    """One heat map for each round of pruning."""
    rounds = saved["rounds"]
    maps = []
    for number, entry in enumerate(rounds, 1):
        removed = {int(layer): heads for layer, heads in entry["removed"].items()}
        gone = sum(len(heads) for heads in removed.values())
        title = f"{f'Round {number}: ' if len(rounds) > 1 else ''}{gone} heads removed"
        maps.append(heat_map(title, entry["scores"], removed))
    scored = f"Scores: {saved['importance']}. "
    more = "Each round scores and numbers the heads that the round before left. " if len(rounds) > 1 else ""
    return f"<div class='heats'>{''.join(maps)}</div><p class='note'>{escape(scored + more)}</p>"


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td class='wrap'>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div class='scroll panel' tabindex='0'><table class='facts'><tbody>{rows}</tbody></table></div>"


def _repeat(results: Mapping[str, Any]) -> str:
    facts = {name: results[name] for name in ("seed", "device", "train_samples") if name in results}
    facts |= results["versions"]
    return f"<pre>{escape(command_lines(results['command']))}</pre><p></p>{_facts(facts)}"


def _minus(text: str) -> str:
    """Escaped, with a minus sign as long as the plus sign."""
    return re.sub(r"(?<![\w.])-(?=\d)", "&minus;", escape(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="of a finished run")
    folder: Path = parser.parse_args().folder
    if not (folder / "results.json").is_file():
        parser.exit(1, f"{parser.prog}: {folder} has no results.json: name the --output_dir of a finished run\n")
    print(write_report(folder))


if __name__ == "__main__":
    main()
