"""One matrix product per group: the queries of a group are stacked into one tall matrix.

"b (n g) q d -> b n (g q) d", so that each key and value is read once per group; in a decode step that turns g
matrix-vector products into one matrix product. Forms the matrix of weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.mask import Mask


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `Kind.attention`; returns no weights."""
    batch, num_heads, q_length, head_dim = query.shape
    num_groups, kv_length = key.shape[1], key.shape[2]
    stacked = (query * scaling).reshape(batch, num_groups, -1, head_dim)
    scores = (stacked @ key.transpose(-1, -2)).view(batch, num_heads, q_length, kv_length)
    weights = F.dropout(mask.softmax(scores), dropout)
    output = weights.view(batch, num_groups, -1, kv_length) @ value
    return output.view(batch, num_heads, q_length, -1), None
