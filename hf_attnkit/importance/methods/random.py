"""Random scores: the honest baseline. Fine-tuning after random pruning recovers much of the loss
(Prasanna et al. 2020; Budhraja et al. 2020), so a score is worth what it gains over this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.models.layers import AttentionLayer

NEEDS_BATCHES = False


def check(*, seed: int = 0) -> None:
    """Raises `ValueError` unless `seed` is an integer of at least 0."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r} must be an integer of at least 0")


def score(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    batches: Iterable[Mapping[str, Any]] | None,
    *,
    seed: int = 0,
) -> list[Tensor]:
    """Independent uniform numbers in [0, 1), the same for the same seed. For each layer `(num_heads,)`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(layer.num_heads, generator=generator) for layer in layers]
