"""Prune a fine-tuned model's heads and recover it: evaluate, score on training data, prune, evaluate, train, evaluate.

    accelerate launch recipes/prune_heads_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --importance gradient --prune_fraction 0.5 --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-pruned

`--prune_steps 3` prunes and trains in three rounds of equally many heads, each scored anew and trained for
`--num_train_epochs`; `--latency_target 0.8` removes as many heads as it takes until a forward pass takes 0.8 of the
time of the untouched model; `--refit` fits what is left to the model before, without labels. On grouped heads whole
groups are removed, or with `--groups across` equally many heads of every group.

Writes the recovered model, results.json (stages "baseline", and of each round "changed" and "recovered"), the scores
and removed heads of each round (head_importance.json) and their heat maps (head_importance.png) into --output_dir.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

import hf_attnkit
from hf_attnkit.experiment.comparing.prunings import rows_of
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.pruning import REFITS, Heads, Scoring, SelectionArguments, parse_options, prune
from hf_attnkit.experiment.report.heat_map import draw_importance
from hf_attnkit.experiment.sweep import runs
from hf_attnkit.importance import METHODS
from hf_attnkit.models.layers import attention_layers

REFIT_SAMPLES = 2048


@dataclass
class PruningArguments(SelectionArguments):
    prune_fraction: float | None = field(
        default=None, metadata={"help": "Share of all heads to remove, between 0 and 1."}
    )
    latency_target: float | None = field(
        default=None,
        metadata={"help": "Instead: share of the untouched model's forward time on scored sentences, between 0 and 1."},
    )
    prune_steps: int = field(default=1, metadata={"help": "Rounds of pruning and training."})
    importance: str = field(default="gradient", metadata={"help": "Scoring method.", "choices": list(METHODS)})
    importance_options: list[str] = field(
        default_factory=list, metadata={"help": "The method's options, such as direction=focused or seed=1."}
    )
    rearrange: bool = field(default=False, metadata={"help": "Mask search after fisher (Kwon et al. 2022)."})
    refit: str = field(
        default="output",
        metadata={"help": "Fit outputs to the model before; or one scale per head; or none.", "choices": list(REFITS)},
    )
    score_samples: int = field(default=512, metadata={"help": "Training sentences to score on, and to time."})
    refit_samples: int | None = field(
        default=None, metadata={"help": "Training sentences for the refit, without labels; 2,048."}
    )

    def __post_init__(self) -> None:
        if (self.prune_fraction is None) == (self.latency_target is None):
            raise ValueError("give one of --prune_fraction and --latency_target")
        for name in ("prune_fraction", "latency_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"--{name} {value} must be above 0 and below 1")
        if self.refit == "none" and self.refit_samples is not None:
            raise ValueError(f"--refit_samples {self.refit_samples} has no effect with --refit none; leave it out")
        if self.refit != "none" and self.refit_samples is None:
            self.refit_samples = REFIT_SAMPLES
        for name in ("score_samples", "refit_samples", "prune_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        self.scoring = Scoring(
            self.importance, parse_options(self.importance_options, "--importance_options"), self.rearrange
        )
        self.scoring.check()

    def facts(self) -> dict[str, Any]:
        """For results.json."""
        names = ("prune_fraction", "latency_target", "prune_steps", "importance", "rearrange", "refit", "score_samples",
                 "refit_samples")  # fmt: skip
        asked = {name: getattr(self, name) for name in names}
        return asked | self.selection() | {"importance_options": self.scoring.options}


class Pruner:
    """Chooses the heads of each round, towards the fraction or latency that the last one is to reach."""

    def __init__(self, model: PreTrainedModel, arguments: PruningArguments, batches: list[Any]) -> None:
        """
        Raises:
            ValueError: a fraction that cannot be removed, or less than a head in a round; before anything long runs.
        """
        self.arguments, self.batches = arguments, batches
        self.total = number_of_heads(model)
        self.untouched = copy.deepcopy(model) if arguments.latency_target is not None else None
        if arguments.prune_fraction is None:
            return
        any_scores = hf_attnkit.head_importance(model, method="random")
        arguments.select(model, any_scores, fraction=arguments.prune_fraction)  # refuses what cannot be removed
        first = self._goal(1)
        if not first or not arguments.select(model, any_scores, num_heads=first):
            raise ValueError(
                f"--prune_fraction {arguments.prune_fraction} removes no head in the first of {arguments.prune_steps} "
                "rounds: it is less than one head (or one group, where heads share keys and values); ask for more, or "
                "fewer rounds"
            )

    def _goal(self, step: int) -> int:
        """Heads that are gone after so many rounds."""
        share = self.arguments.prune_fraction * step / self.arguments.prune_steps
        return int(share * self.total + 1e-9)

    def choose(self, model: PreTrainedModel, scores: Tensor, gradients: Tensor | None, step: int) -> Heads:
        """The heads that go in round `step`, counted from 1."""
        arguments = self.arguments
        if self.untouched is None:
            gone = self.total - number_of_heads(model)
            left = self._goal(step) - gone
            # A fraction rounds down to whole groups, which a number of heads does not.
            return arguments.select(model, scores, gradients, fraction=(left + 1e-6) / number_of_heads(model))
        self.untouched.to(model.device)
        wanted = 1 - (1 - arguments.latency_target) * step / arguments.prune_steps
        now = self.latency(model) if step > 1 else 1.0
        if wanted >= now:
            return {}
        removed = hf_attnkit.select_for_target(
            *(model, scores, self.batches),
            latency=wanted / now,
            **arguments.selection(),
        )
        return arguments.rearranged(model, gradients, removed)

    def latency(self, model: PreTrainedModel) -> float:
        """Forward time as a share of the untouched model's, both in turn, on the scored sentences."""
        return hf_attnkit.pruning.select_for_target.forward_share(self.untouched, model, self.batches)


def number_of_heads(model: PreTrainedModel) -> int:
    return sum(len(layer.heads) for layer in attention_layers(model))


def scores_and_heads(entry: dict[str, Any]) -> tuple[Tensor, Heads]:
    """What a round noted as JSON, as the library has it: NaN where a layer has no such head."""
    scores = [[math.nan if score is None else score for score in row] for row in entry["scores"]]
    return torch.tensor(scores), {int(layer): heads for layer, heads in entry["removed"].items()}


def main() -> None:
    for parsed in runs(GlueArguments, PruningArguments):
        prune_and_recover(*parsed)


def prune_and_recover(arguments: GlueArguments, pruning: PruningArguments, training: TrainingArguments) -> None:
    """One run."""
    if pruning.importance == "random":
        pruning.scoring.options.setdefault("seed", training.seed)
    run = GlueRun(arguments, training, pruning)
    batches, refit_batches = (
        list(run.calibration_batches(size)) if size else [] for size in (pruning.score_samples, pruning.refit_samples)
    )
    pruner = Pruner(run.model, pruning, batches)
    run.model.to(training.device)
    run.evaluate("baseline")

    def prune_round(step: int) -> dict[str, Any]:
        scores, gradients = pruning.scoring.scores(run.model, batches)
        removed = pruner.choose(run.model, scores, gradients, step)
        if removed:
            prune(run.model, removed, pruning.refit, refit_batches)
        facts = {"round": step, "scores": rows_of(scores), "removed": removed}
        timed = {"latency": round(pruner.latency(run.model), 3)} if pruning.latency_target is not None else {}
        return facts | timed

    rounds: list[dict[str, Any]] = []
    for step in range(1, pruning.prune_steps + 1):
        rounds.append(run.change(partial(prune_round, step)))
        run.evaluate("changed", **{name: value for name, value in rounds[-1].items() if name != "scores"})
        if training.do_train:
            run.evaluate("recovered", round=step, **run.train())
    if training.should_save:
        maps = {
            f"round {entry['round']}" if len(rounds) > 1 else "heads removed": scores_and_heads(entry)
            for entry in rounds
        }
        saved = [{name: value for name, value in entry.items() if name != "latency"} for entry in rounds]
        facts = {"importance": pruning.importance, "importance_options": pruning.scoring.options}
        write_json(run.output / "head_importance.json", {**facts, "rounds": saved})
        draw_importance(maps, run.output / "head_importance.png", f"{pruning.importance}, {run.task_name} ({run.data})")
    run.finish(**pruning.facts())


if __name__ == "__main__":
    main()
