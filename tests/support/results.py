"""What results.json holds, of runs of each sort; made up, in the form of hf_attnkit.experiment.report.schema."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

FULL, CUT = [12] * 6, [8, 5, 7, 6, 4, 6]
BASELINE, CHANGED, RECOVERED, CONTROL = 0.5, 0.3, 0.45, 0.6  # the first metric


def stage(name: str, metric: float, heads: list[int] = FULL, **facts: Any) -> dict[str, Any]:
    """A measured stage of an encoder."""
    costs = {"peak_memory_bytes": 900 << 20, "peak_memory_of": "resident memory of the process", "work_seconds": 77.7}
    return {
        "stage": name, "metrics": {"matthews_correlation": metric, "accuracy": 0.8}, "parameters": 1000 * sum(heads),
        "num_heads": heads, "num_key_value_heads": heads, "key_value_bytes_per_token": None, **costs, **facts,
    }  # fmt: skip


def stage_time(name: str, median: float, spread: float = 0.01) -> dict[str, Any]:
    ratio = {"median": median, "lower_quartile": median - spread, "upper_quartile": median + spread}
    return {"stage": name, "ratio": ratio, "milliseconds": {"median": 412.0 * median}}


PRUNED: dict[str, Any] = {
    "task": "cola",
    "model": {"name": "MiniLM", "path": "owner/MiniLM", "model_type": "bert"},
    "data": {
        "name": "CoLA", "hub_path": "nyu-mll/glue", "config": "cola", "language": "en",
        "splits": {"train": "train", "evaluation": "validation"}, "task_type": "text-classification",
        "train_examples": 8551, "evaluation_examples": 1043, "is_benchmark": True, "note": None,
    },
    "change": {"kind": "pruning", "title": "half of the attention heads removed", "facts": {"heads_removed": 36}},
    "actions": {"trained": True, "measured": True, "predicted": False},
    "stages": [stage("baseline", BASELINE), stage("changed", CHANGED, CUT), stage("recovered", RECOVERED, CUT)],
    "timing": {
        "batch_size": 32, "sequence_length": 64, "repeats": 31, "device": "CPU x86_64, 2 threads",
        "stages": [stage_time("baseline", 1.0, 0.0), stage_time("changed", 0.83), stage_time("recovered", 0.84)],
    },
    "control": None,
    "importance": "entropy", "importance_options": {"direction": "focused"}, "rearrange": False,
    "train_samples": 8551, "seed": 42, "device": "CPU x86_64, 2 threads",
    "command": "python recipes/prune_heads_glue.py --model_name_or_path owner/MiniLM --task_name cola",
    "versions": {"hf_attnkit": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip

SCORES = [[0.5, None, 0.1], [0.2, 0.3, 900.0]]
IMPORTANCE = {"importance": "entropy", "rounds": [{"scores": SCORES, "removed": {"0": [2], "1": [0, 1]}}]}


def made(**different: Any) -> dict[str, Any]:
    """A run that pruned and trained, but for these keys."""
    return copy.deepcopy(PRUNED | different)


def with_control() -> dict[str, Any]:
    """The same with the untouched model trained as long."""
    return made(stages=[*PRUNED["stages"], stage("control", CONTROL)], control=3)


def measured_only() -> dict[str, Any]:
    """`--do_eval` alone."""
    actions = {"trained": False, "measured": True, "predicted": False}
    data = PRUNED["data"] | {"train_examples": None, "splits": {"train": None, "evaluation": "validation"}}
    return made(change=None, actions=actions, data=data, stages=[stage("baseline", BASELINE)], timing=None)


def predicted_only() -> dict[str, Any]:
    """`--predict` alone."""
    results = measured_only()
    results["actions"] = {"trained": False, "measured": False, "predicted": True}
    results["data"] |= {"evaluation_examples": None, "splits": {"train": None, "evaluation": None}}
    return results | {"stages": [], "predictions": ["predictions/CoLA.tsv"]}


def decoder() -> dict[str, Any]:
    """A language model, converted, measured by perplexity, with a cache."""
    sizes = {"baseline": (4, 9216), "changed": (1, 2304), "recovered": (1, 2304)}
    stages = [
        stage(name, 0.0) | {"metrics": {"perplexity": 12.5 + place}, "num_heads": [4, 4],
                            "num_key_value_heads": [heads] * 2, "key_value_bytes_per_token": size}
        for place, (name, (heads, size)) in enumerate(sizes.items())
    ]  # fmt: skip
    data = PRUNED["data"] | {"name": "WikiText-2", "hub_path": "local", "config": None, "is_benchmark": False,
                             "task_type": "text-generation"}  # fmt: skip
    change = {"kind": "conversion", "title": "converted to 1 key/value head", "facts": {"method": "pca"}}
    return made(stages=stages, data=data, change=change, timing=None)


def replaced(value: Any, text: Callable[[str], Any]) -> Any:
    """`value` with every text in it, names too, replaced."""
    if isinstance(value, dict):
        return {text(str(key)): replaced(part, text) for key, part in value.items()}
    if isinstance(value, list):
        return [replaced(part, text) for part in value]
    return text(value) if isinstance(value, str) else value


def planted(results: dict[str, Any], text: Callable[[str], Any], keep: set[str] | None = None) -> dict[str, Any]:
    """Results with every text replaced but the keys of the schema, whose names mean something."""
    kept = keep or KEYS
    return replaced(results, lambda word: word if word in kept else text(word))


KEYS = (
    set(PRUNED) | set(PRUNED["model"]) | set(PRUNED["data"]) | set(PRUNED["change"]) | set(PRUNED["actions"])
    | set(PRUNED["timing"]) | set(PRUNED["stages"][0]) | set(stage_time("", 0)) | {"splits", "evaluation", "train"}
    | {"median", "lower_quartile", "upper_quartile", "predictions", "facts"}
)  # fmt: skip
