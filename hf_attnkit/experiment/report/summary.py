"""What a run did, in the words that title, page and card share. It reads what results.json says happened."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from typing import Any, cast

from hf_attnkit.experiment.report.schema import COMMON, Data, Results
from hf_attnkit.experiment.report.stage_table import headline, label, share_of_control

_ORIGINS = {"local": "local files", "demo": "sentences that hf_attnkit makes, not GLUE"}


def title(results: Results) -> str:
    """Model, what was done to it, and the data, such as "MiniLM, half of the attention heads removed, CoLA"."""
    actions, model, data = results["actions"], results["model"]["name"], data_name(results["data"])
    if results["change"] is not None:
        return f"{model}, {results['change']['title']}, {data}"
    if actions["trained"]:
        return f"{model}, trained on {data}"
    return f"{model}, {'measured' if actions['measured'] else 'predictions'} on {data}"


def data_name(data: Data) -> str:
    """What titles call the data."""
    return "demo data" if data["hub_path"] == "demo" else data["name"]


def happened(results: Results) -> dict[str, str]:
    """What was done, a line each; what was not done is said too where one may expect it."""
    actions, data, model, change = results["actions"], results["data"], results["model"], results["change"]
    where = "a local checkpoint" if model["path"] == "local" else model["path"]
    lines = {
        "started from": f"{model['name']} ({where}; {model['model_type']})",
        "change": change["title"] if change is not None else "none",
        "data": _origin(data),
        "training": _amount(data, "train") if actions["trained"] else "none in this run",
        "measurement": _amount(data, "evaluation") if actions["measured"] else "none in this run",
    }
    if actions["predicted"]:
        lines["predictions"] = _written(_files(results) or "of the final model")
    return lines


def comparison(results: Results) -> str:
    """What tells a recovery from what the training alone does: the control, or that it is missing; else nothing."""
    stages, control = results["stages"], results["control"]
    recovered = [stage for stage in stages if stage["stage"] == "recovered"]
    metric = headline(stages)
    if not recovered or metric is None:
        return ""
    if control is None:
        return (
            "The comparison with an untouched model that was trained as long is missing. Training alone may explain a "
            "part of the difference between baseline and recovered; --control measures it."
        )
    last = recovered[-1]
    value, reference = last["metrics"][metric], stages[control]["metrics"][metric]
    share = share_of_control(stages, control, last)
    return (
        f"Control: the untouched model, trained as long, has {metric} {reference:.4f}. The stage {label(last)} has "
        f"{value:.4f}, a difference of {value - reference:+.4f}"
        f"{f' ({share:.1%} of the control)' if share is not None else ''}."
    )


def change_facts(results: Results) -> dict[str, str]:
    """Facts of the change, written out; empty ones are left out."""
    return _facts(results["change"]["facts"]) if results["change"] is not None else {}


def settings(results: Results) -> dict[str, str]:
    """The recipe's own settings, written out; those that are off or empty are left out."""
    return _facts(_settings(results))


def layer_costs(results: Results) -> dict[str, str]:
    """What each layer's linearisation costs, the highest first."""
    costs = results.get("layer_costs") or {}
    linear = cast(Mapping[str, Any], results).get("linear_layers", [])
    ordered = sorted(costs.items(), key=lambda each: each[1], reverse=True)
    return {f"layer {at}": f"{cost:.3g}{'' if int(at) in linear else ', keeps softmax'}" for at, cost in ordered}


def branches(results: Results) -> dict[str, str]:
    """What the window and linear attention score, together and each alone, and the linear share of the output."""
    found = results.get("branches") or {}
    if not found:
        return {}
    named = {"both": "both branches", "window": "the window alone", "linear": "linear attention alone"}
    lines = {text: f"{found['metric']} {found[name]:.4f}" for name, text in named.items()}
    shares = found.get("linear_shares", {})
    energy = {f"layer {at}, linear share of the output's energy": f"{share:.1%}" for at, share in shares.items()}
    return lines | energy


def flag(results: Results, name: str) -> bool:
    """Whether a setting of the recipe is on."""
    return _settings(results).get(name) is True


def command_lines(command: str) -> str:
    """A command line with a line for each flag, as a shell reads it."""
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _settings(results: Results) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in COMMON and name != "predictions"}


def _files(results: Results) -> list[str]:
    """Where the predictions are, if the recipe tells."""
    return list(cast(Mapping[str, Any], results).get("predictions") or [])


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    return {name: _written(value) for name, value in found.items() if value not in (None, False, [], {}, "")}


def _origin(data: Data) -> str:
    where = _ORIGINS.get(data["hub_path"], data["hub_path"])
    config = f", configuration {data['config']}" if data["config"] and data["hub_path"] not in _ORIGINS else ""
    return f"{data_name(data)}{', a task of GLUE' if data['is_benchmark'] else ''} ({where}{config})"


def _amount(data: Data, which: str) -> str:
    number, split = (
        (data["train_examples"], data["splits"]["train"])
        if which == "train"
        else (data["evaluation_examples"], data["splits"]["evaluation"])
    )
    parts = ["number of examples unknown" if number is None else f"{number:,} examples"]
    parts += [f"split {split}"] if split else []
    parts += [data["note"]] if data["note"] and which == "evaluation" else []
    return ", ".join(parts)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_written(part)}" for name, part in value.items())
    if not isinstance(value, list):
        return str(value)
    runs = [(_written(part), len(list(run))) for part, run in itertools.groupby(value)]
    return ", ".join(part if number == 1 else f"{number} x {part}" for part, number in runs)
