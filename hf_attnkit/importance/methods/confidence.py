"""Confidence of a head (Voita et al. 2019, arXiv 1905.09418): how much it gives to the key it likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.online import largest_weight
from hf_attnkit.importance.queries import mean_over_queries
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Confidence(Score):
    """Mean over all queries that are no padding of max_j p_ij, without the attention matrix.

    From 1 / (number of keys) to 1. A learned sink is a key too.
    """

    name = "confidence"

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        means = mean_over_queries(model, layers, batches, largest_weight, fewest_keys=1, what="confidence")
        return [mean.float() for mean in means]
