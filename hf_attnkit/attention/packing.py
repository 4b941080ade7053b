"""Packed rows: several documents in one row, told apart by `position_ids` that restart.

    position_ids    0 1 2 3 0 1 2        starts    . . . . x . .

Transformers looks for them in causal models, and only in a call without a cache and without an `attention_mask`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def starts(position_ids: Any, attention_mask: Tensor | None = None) -> Tensor | None:
    """Which tokens begin another document than the token before them, bool `(B, T)`; `None` where no token does.

    A token begins one where its position does not follow the last one, as in Transformers. Padding begins none, nor
    does the first token after it.

    Args:
        position_ids: `(B, T)`; anything else has no documents.
        attention_mask: `(B, T or more)`, nonzero for real tokens; the last T columns are of these tokens.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    if attention_mask is not None and attention_mask.shape[-1] >= begins.shape[1]:
        real = attention_mask[:, -begins.shape[1] :].to(begins.device).bool()
        begins = begins & real & F.pad(real[:, :-1], (1, 0))
    return begins if bool(begins.any()) else None
