"""Random scores: the honest baseline. Fine-tuning after random pruning recovers much of the loss
(Prasanna et al. 2020; Budhraja et al. 2020), so a score is worth what it gains over this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Random(Score):
    """Independent uniform numbers in [0, 1), the same for the same seed."""

    name = "random"
    needs_batches = False

    seed: int = 0

    def __post_init__(self) -> None:
        store(self, seed=integer(self.seed, "seed", minimum=0))

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.rand(layer.num_heads, generator=generator) for layer in layers]
