"""Prune in rounds towards a share of the heads or of the time: the arguments, and the heads of each round."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.experiment.arguments import ChangeArguments
from hf_attnkit.experiment.pruning import REFITS, Heads, Scoring, SelectionArguments, parse_options
from hf_attnkit.experiment.record import Change
from hf_attnkit.importance import METHODS
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.observing.batches import to_device
from hf_attnkit.pruning.select_for_target import REPEATS, forward_share

DEFAULT_SCORE: str = inspect.signature(hf_attnkit.head_importance).parameters["method"].default


@dataclass
class PruningArguments(SelectionArguments, ChangeArguments):
    """A recipe adds how much data scores and refit look at, in sentences or tokens, and calls `check_sizes`."""

    reads_training_data: ClassVar[bool] = True
    prune_fraction: float | None = field(
        default=None, metadata={"help": "Share of all heads to remove, between 0 and 1."}
    )
    latency_target: float | None = field(
        default=None,
        metadata={"help": "Instead: share of the untouched model's forward time to reach, between 0 and 1."},
    )
    prune_steps: int = field(default=1, metadata={"help": "Rounds of pruning and training."})
    importance: str = field(default=DEFAULT_SCORE, metadata={"help": "Scoring method.", "choices": list(METHODS)})
    importance_options: list[str] = field(
        default_factory=list, metadata={"help": "The method's options, such as direction=focused or seed=1."}
    )
    rearrange: bool = field(
        default=False, metadata={"help": "Mask search (Kwon et al. 2022) after the scores of fisher."}
    )
    refit: str = field(
        default="output",
        metadata={
            "help": "What is fitted to the model before: the outputs, one scale per head, or nothing.",
            "choices": list(REFITS),
        },
    )

    def __post_init__(self) -> None:
        if (self.prune_fraction is None) == (self.latency_target is None):
            raise ValueError("give one of --prune_fraction and --latency_target")
        for name in ("prune_fraction", "latency_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"--{name} {value} must be above 0 and below 1")
        if self.prune_steps < 1:
            raise ValueError(f"--prune_steps {self.prune_steps} must be at least 1")
        self.scoring = Scoring(
            self.importance, parse_options(self.importance_options, "--importance_options"), self.rearrange
        )
        self.scoring.check()

    def check_sizes(self, score: str, refit: str, refit_default: int) -> None:
        """Give the refit its default size, and refuse numbers that are none.

        Args:
            score, refit: the names of the arguments that say how much data each looks at.
            refit_default: the size for a refit that none is given for, in the same units.

        Raises:
            ValueError: a number below 1, or a size for a refit that there is none of.
        """
        if self.refit == "none" and getattr(self, refit) is not None:
            raise ValueError(f"--{refit} {getattr(self, refit)} has no effect with --refit none; leave it out")
        if self.refit != "none" and getattr(self, refit) is None:
            setattr(self, refit, refit_default)
        for name in (score, refit):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")

    def facts(self) -> dict[str, Any]:
        """For results.json, without the sizes."""
        names = ("prune_fraction", "latency_target", "prune_steps", "importance", "rearrange", "refit")
        asked = {name: getattr(self, name) for name in names}
        return asked | self.selection() | {"importance_options": self.scoring.options}


class Pruner:
    """Chooses the heads of each round, so that the last round reaches the fraction or the latency."""

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
        if not arguments.select(model, any_scores, fraction=self._share(self._goal(1), model)):
            raise ValueError(
                f"--prune_fraction {arguments.prune_fraction} removes no head in the first of {arguments.prune_steps} "
                "rounds: it is less than one head (or one group, where heads share keys and values); ask for more, or "
                "fewer rounds"
            )

    def _goal(self, step: int) -> int:
        """Heads that are removed after so many rounds."""
        fraction = cast(float, self.arguments.prune_fraction)  # checked: without a latency target there is one
        return int(fraction * step / self.arguments.prune_steps * self.total + 1e-9)

    @staticmethod
    def _share(heads: int, model: PreTrainedModel) -> float:
        """Of the model as it is: a fraction rounds down to whole groups, which a number of heads does not."""
        return (heads + 1e-6) / number_of_heads(model)

    def choose(self, model: PreTrainedModel, scores: Tensor, gradients: Tensor | None, step: int) -> Heads:
        """The heads to remove in round `step`, counted from 1."""
        arguments = self.arguments
        if self.untouched is None or arguments.latency_target is None:
            gone = self.total - number_of_heads(model)
            share = self._share(self._goal(step) - gone, model)
            return arguments.select(model, scores, gradients, fraction=share)
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
        """Forward time as a share of the untouched model's, both timed alternately, on the scored sentences."""
        if self.untouched is None:
            return 1.0
        inputs = [to_device(batch, model) for batch in self.batches]
        return forward_share(self.untouched.to(model.device), model, inputs, REPEATS)


def number_of_heads(model: PreTrainedModel) -> int:
    return sum(len(layer.heads) for layer in attention_layers(model))


def removal(total: int, removed: int, arguments: PruningArguments) -> Change:
    """What was done to the model, for titles and the card."""
    share = {0.25: "a quarter", 1 / 3: "a third", 0.5: "half", 2 / 3: "two thirds", 0.75: "three quarters"}
    amount = share.get(removed / total, f"{removed / total:.0%}") if removed else "none"
    facts = {"heads": total, "removed": removed, "score": arguments.importance, "refit": arguments.refit}
    return Change("pruning", f"{amount} of the attention heads removed", facts)


def scores_and_heads(entry: dict[str, Any]) -> tuple[Tensor, Heads]:
    """Scores and heads of a round from JSON, as the library has them: NaN where a layer has no such head."""
    scores = [[math.nan if score is None else score for score in row] for row in entry["scores"]]
    return torch.tensor(scores), {int(layer): heads for layer, heads in entry["removed"].items()}
