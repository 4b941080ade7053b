"""Sensitivity of the loss to a gate on the head (Michel et al. 2019, arXiv 1905.10650)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.gates import sum_over_examples
from hf_attnkit.importance.score import Batches, ScoreOfLoss
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Gradient(ScoreOfLoss):
    """E_x |dL(x) / dxi_h|, the mean over examples; xi_h = 1 multiplies the head's output at all tokens of x.

    The absolute value is of each example and not of a batch, so batches do not matter. At least 0, in the loss's unit
    (nats for cross-entropy): to first order how much an example's loss changes if the head is removed.
    """

    name = "gradient"

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        sums, number = sum_over_examples(
            model, layers, batches, lambda gradient: gradient.sum((1, 2)).abs(), labels=self.labels,
            description="gradient",
        )  # fmt: skip
        return [(total / number).float() for total in sums]
