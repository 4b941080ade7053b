"""One pass without a cache, and the same piece by piece with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def whole(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of one pass without a cache."""
    return model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


def in_steps(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any, steps: list[int]) -> Tensor:
    """The same fed piece by piece into a cache."""
    logits, start = [], 0
    for step in steps:
        stop = start + step
        output = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions(mask)[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)
