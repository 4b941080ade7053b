"""First-order Taylor expansion of removing a head, token by token (Molchanov et al. 2017, arXiv 1611.06440)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.gates import sum_over_examples
from hf_attnkit.importance.score import Batches, ScoreOfLoss
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Taylor(ScoreOfLoss):
    """E_x sum_t |a_th . dL(x) / da_th|, the mean over examples; a_th is the head's output at the real token t.

    Each term is to first order the change of the loss if the head is removed at that token only. Their plain sum is
    dL/dxi_h, so with the absolute value outside the sum, as Molchanov et al. have it, this would be `gradient`; inside,
    tokens at which the head helps do not cancel those at which it harms, and the score is at least that of `gradient`.
    At least 0, in the loss's unit.
    """

    name = "taylor"

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        sums, number = sum_over_examples(
            model, layers, batches, lambda gradient: gradient.abs().sum((1, 2)), labels=self.labels, per_token=True,
            description="taylor",
        )  # fmt: skip
        return [(total / number).float() for total in sums]
