"""Diagonal Fisher information of a gate on the head (Kwon et al. 2022, arXiv 2204.09656)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.gates import sum_over_examples
from hf_attnkit.importance.score import Batches, ScoreOfLoss
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Fisher(ScoreOfLoss):
    """sum_x (dL(x) / dxi_h)^2 over examples; xi_h = 1 multiplies the head's output at all tokens of x.

    At least 0, in squared units of the loss; grows with the number of examples.
    """

    name = "fisher"

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        sums, _ = sum_over_examples(
            model, layers, batches, lambda gradient: gradient.sum((1, 2)).square(), labels=self.labels,
            description="fisher",
        )  # fmt: skip
        return [total.float() for total in sums]
