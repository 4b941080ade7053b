"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), without repeating keys and values.

    query heads      0 1 2 3 | 4 5 6 7        consecutive heads form a group
    key/value heads     0    |    1           and share one key and one value head

The queries of a group are stacked into one tall matrix, "b (n g) q d -> b n (g q) d", so that each
key and value is read once per group; in a decode step that turns g matrix-vector products into one
matrix product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .mask import Mask

OWN_WINDOW = True


def check(num_heads: int, num_key_value_heads: int) -> None:
    """Any number of groups is fine, one head per group (multi-head) included."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `mha.attention`; returns no weights."""
    batch, num_heads, q_length, head_dim = query.shape
    num_groups, kv_length = key.shape[1], key.shape[2]
    stacked = (query * scaling).reshape(batch, num_groups, -1, head_dim)
    scores = (stacked @ key.transpose(-1, -2)).view(batch, num_heads, q_length, kv_length)
    weights = F.dropout(mask.softmax(scores), dropout)
    output = weights.view(batch, num_groups, -1, kv_length) @ value
    return output.view(batch, num_heads, q_length, -1), None
