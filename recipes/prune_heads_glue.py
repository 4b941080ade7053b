"""Prune a fine-tuned model's heads and recover it: evaluate, score on training data, prune, evaluate, train, evaluate.

    accelerate launch recipes/prune_heads_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --importance entropy --prune_fraction 0.5 --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-pruned

Writes the recovered model, results.json (stages "baseline", "changed", "recovered"), the scores and
removed heads (head_importance.json) and their heat map (head_importance.png) into --output_dir.
On grouped heads whole groups are removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from base_run import parse_arguments
from glue_run import GlueArguments, GlueRun
from heat_map import draw_importance
from report import write_json

import hf_attnkit
from hf_attnkit.families import attention_layers
from hf_attnkit.importance import METHODS, check_method


@dataclass
class PruningArguments:
    prune_fraction: float = field(metadata={"help": "Share of all heads to remove, from 0 to below 1."})
    importance: str = field(default="entropy", metadata={"help": "Scoring method.", "choices": list(METHODS)})
    importance_options: list[str] = field(
        default_factory=list, metadata={"help": "The method's options, such as direction=focused or seed=1."}
    )
    score_samples: int = field(default=512, metadata={"help": "Training sentences to score on."})


def parse_options(pairs: list[str]) -> dict[str, float | str | bool]:
    """`["seed=1", "direction=focused"]` to a dictionary; numbers, true and false are converted.

    Raises:
        ValueError: for an entry that is not name=value.
    """
    words: dict[str, bool] = {"true": True, "false": False}
    options: dict[str, float | str | bool] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            raise ValueError(f"--importance_options {pair!r} must have the form name=value, such as seed=1")
        options[name] = words[value] if value in words else _number(value)
    return options


def _number(text: str) -> float | str:
    """The whole or decimal number that the text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def main() -> None:
    arguments, pruning, training = parse_arguments(GlueArguments, PruningArguments)
    if not 0 < pruning.prune_fraction < 1:
        raise ValueError(f"--prune_fraction {pruning.prune_fraction} must be above 0 and below 1")
    if pruning.score_samples < 1:
        raise ValueError(f"--score_samples {pruning.score_samples} must be at least 1")
    options = parse_options(pruning.importance_options)
    if pruning.importance == "random":
        options.setdefault("seed", training.seed)
    check_method(pruning.importance, options)
    run = GlueRun(arguments, training)
    groups = [layer.num_key_value_heads for layer in attention_layers(run.model)]
    # A fraction that cannot be removed is refused before the first evaluation, which may take long.
    any_scores = hf_attnkit.head_importance(run.model, method="random")
    if not hf_attnkit.select_heads(any_scores, fraction=pruning.prune_fraction, num_key_value_heads=groups):
        raise ValueError(
            f"--prune_fraction {pruning.prune_fraction} removes no head: it is less than one head (or one group, where "
            "heads share keys and values); ask for more"
        )
    run.model.to(training.device)
    run.evaluate("baseline")

    scores = hf_attnkit.head_importance(
        run.model, run.calibration_batches(pruning.score_samples), method=pruning.importance, **options
    )
    removed = hf_attnkit.select_heads(scores, fraction=pruning.prune_fraction, num_key_value_heads=groups)
    hf_attnkit.prune_heads(run.model, removed)
    run.evaluate("changed")

    if training.do_train:
        trained = run.train()
        run.evaluate("recovered", **trained)
    if training.should_save:
        title = f"{pruning.importance}, {run.task_name} ({run.data})"
        # JSON has no NaN, which marks the places of heads that a layer does not have.
        rows = [[None if math.isnan(score) else score for score in row] for row in scores.tolist()]
        write_json(run.output / "head_importance.json", {"scores": rows, "removed": removed})
        draw_importance({title: (scores, removed)}, run.output / "head_importance.png")
    run.finish(importance=pruning.importance, importance_options=options, prune_fraction=pruning.prune_fraction,
               removed=removed)  # fmt: skip


if __name__ == "__main__":
    main()
