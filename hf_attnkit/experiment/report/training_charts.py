"""Charts of what `Trainer` logged: losses, learning rate, metrics, and attention entropies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from hf_attnkit.experiment.report.chart import Chart, Line, line_chart

History = Sequence[Mapping[str, float]]  # `log_history` of a training

ENTROPY = re.compile(r"attention_entropy/layer_(\d+)/(mean|min)")
TRANSFER = re.compile(r"transfer_loss/layer_(\d+)")
# Of an evaluation's log: how fast it was, which is no curve of training.
_SPEED = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
_LEGEND = 12  # layers that the legend names one by one


def curves(history: History) -> list[Chart]:
    """Loss, learning rate, and every metric that was evaluated during training."""
    charts = []
    losses = {"training": "loss", "evaluation": "eval_loss"}
    if lines := [Line(name, points) for name, key in losses.items() if (points := _points(history, key))]:
        charts.append(line_chart("Loss", "loss", lines))
    if rates := _points(history, "learning_rate"):
        charts.append(line_chart("Learning rate", "learning rate", [Line("learning rate", rates)]))
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith("eval_"))
    for key in keys:
        if key != "eval_loss" and not _SPEED.search(key):
            name = key.removeprefix("eval_")
            charts.append(line_chart(f"{name}, evaluated while training", name, [Line(name, _points(history, key))]))
    return charts


def entropies(history: History) -> list[Chart]:
    """Attention entropy of each layer: mean over its heads, and its most focused head."""
    found: dict[str, dict[int, str]] = {"mean": {}, "min": {}}
    for entry in history:
        for key in entry:
            if match := ENTROPY.fullmatch(key):
                found[match[2]].setdefault(int(match[1]), key)
    charts = []
    for kind, title in (("mean", "Mean over a layer's heads"), ("min", "The layer's most focused head")):
        charts += _by_layer(history, found[kind], title, "share of ln(visible keys)")
    return charts


def transfers(history: History) -> list[Chart]:
    """The loss of each layer whose features are learned."""
    keys = (match for entry in history for key in entry if (match := TRANSFER.fullmatch(key)))
    return _by_layer(
        history, {int(match[1]): match[0] for match in keys}, "Error of each layer", "of attention's output"
    )


def _by_layer(history: History, keys: Mapping[int, str], title: str, y: str) -> list[Chart]:
    """One chart with a line for each layer, or none."""
    lines = [
        Line(f"layer {layer}", _points(history, keys[layer]), place / max(len(keys) - 1, 1))
        for place, layer in enumerate(sorted(keys))
    ]
    return [line_chart(title, y, lines, legend=_spread(len(lines)))] if lines else []


def last_step(history: History) -> int:
    """The last step that the log names."""
    return max((int(entry["step"]) for entry in history), default=0)


def _points(history: Iterable[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _spread(number: int) -> set[int]:
    """Which lines the legend names: all, or of many some, first and last among them."""
    if number <= _LEGEND:
        return set(range(number))
    return {round(i * (number - 1) / 5) for i in range(6)}
