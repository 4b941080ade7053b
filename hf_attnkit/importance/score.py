"""What a score of heads is: its options as fields, and what it computes.

A score is one file in `methods/` with one frozen dataclass, and one line in `head_importance.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import choice
from hf_attnkit.importance.loss import LABELS
from hf_attnkit.models.layers import AttentionLayer

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Score(ABC):
    """One way to score heads, with its options.

    A subclass is a frozen dataclass. Its fields are the options, with their defaults; `__post_init__` checks their
    values.
    """

    name: ClassVar[str]
    """What users call it, in `head_importance`."""

    needs_batches: ClassVar[bool] = True
    """Whether it looks at data. If not, `batches` is not read."""

    @abstractmethod
    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        """For each layer `(num_heads,)`, float32, higher = keep.

        What is summed over batches goes through `over_processes`, so that several processes get the scores of one.
        """


@dataclass(frozen=True)
class ScoreOfLoss(Score):
    """A score that needs the model's loss.

    Attributes:
        labels: "given", or "predicted" for the model's own answers; see `loss.with_labels`.
    """

    labels: str = "given"

    def __post_init__(self) -> None:
        choice(self.labels, "labels", LABELS)
