"""Score heads and choose which to remove: what the pruning recipes share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.importance import make_score
from hf_attnkit.pruning.select import GROUPS
from hf_attnkit.refitting import options as refitting

REFITS = tuple(word for word in refitting.REFITS if word not in ("full", "descent"))  # keys stay as they are
Heads = dict[int, list[int]]  # layer -> heads


@dataclass
class Scoring:
    """How heads are scored: a method of `head_importance`, its options, and whether the mask search follows."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rearranges: bool = False

    def check(self) -> None:
        """Raise `ValueError` for an unknown method or option, or a mask search after other scores than Fisher's."""
        make_score(self.method, self.options)
        if self.rearranges and self.method != "fisher":
            raise ValueError(f"rearranging belongs to the scores of 'fisher', not to those of {self.method!r}")

    def scores(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor | None]:
        """`(num_layers, num_heads)`, higher = keep, and where the mask search follows each example's gradients."""
        if not self.rearranges:
            return hf_attnkit.head_importance(model, batches, method=self.method, **self.options), None
        gradients = hf_attnkit.head_gradients(model, batches, **self.options)
        return gradients.square().sum(0), gradients


@dataclass
class SelectionArguments:
    groups: str = field(
        default="whole",
        metadata={
            "help": "Where query heads share keys and values: whole groups, or equally many heads across groups.",
            "choices": list(GROUPS),
        },
    )
    per_layer: bool = field(default=False, metadata={"help": "Remove the same share of every layer."})
    min_heads: int = field(
        default=1, metadata={"help": "Fewest heads that a layer keeps; with 0 a layer may lose all."}
    )

    def selection(self) -> dict[str, Any]:
        """Of these arguments those that `select_heads` takes."""
        return {"groups": self.groups, "per_layer": self.per_layer, "min_heads": self.min_heads}

    def select(self, model: PreTrainedModel, scores: Tensor, gradients: Tensor | None = None, **amount: Any) -> Heads:
        """`{layer: [head, ...]}` to remove.

        Args:
            amount: `fraction` or `num_heads` of `select_heads`.
        """
        removed = hf_attnkit.select_heads(scores, model=model, **self.selection(), **amount)
        return self.rearranged(model, gradients, removed)

    def rearranged(self, model: PreTrainedModel, gradients: Tensor | None, removed: Heads) -> Heads:
        """After the mask search, where there are gradients."""
        if gradients is None:
            return removed
        return hf_attnkit.rearrange_heads(gradients, removed, model=model)


def prune(
    model: PreTrainedModel, removed: Heads, refit: str | refitting.RefitOptions, batches: Iterable[Mapping[str, Any]]
) -> None:
    """Remove heads, with one of `REFITS`."""
    word = refit if isinstance(refit, str) else refit.fits
    options: dict[str, Any] = {} if word == "none" else {"calibration": batches, "refit": refit}
    hf_attnkit.prune_heads(model, removed, **options)


def parse_options(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """`["seed=1", "direction=focused"]` to a dictionary; numbers, true and false are converted.

    Raises:
        ValueError: for an entry that is not name=value, or a name that is given twice.
    """
    words = {"true": True, "false": False}
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            raise ValueError(f"{flag} {pair!r} must have the form name=value, such as seed=1")
        if name in options:
            raise ValueError(f"{flag} {pair!r} names {name} once more; leave one out")
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
