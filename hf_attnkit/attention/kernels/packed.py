"""One matrix product per group: the queries of a group are stacked into one tall matrix.

"b (n g) q d -> b n (g q) d", so that each key and value is read once per group; in a decode step that turns g
matrix-vector products into one matrix product. Forms the matrix of weights. Keys and values in 8 bits are read block by
block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention import eight_bits
from hf_attnkit.attention.mask import Mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    turned: Tensor | None = None,
    num_turned: int = 0,
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `Kind.attention`; returns no weights.

    Args:
        turned: the queries that the first `num_turned` keys meet in place of `query`: the same at other positions.
    """
    batch, num_heads, q_length, head_dim = query.shape
    num_groups, kv_length = key.shape[1], key.shape[2]
    stacked = (query * scaling).reshape(batch, num_groups, -1, head_dim)
    if turned is None:
        scores = _products(stacked, key)
    else:
        first = (turned * scaling).reshape(stacked.shape)
        both = _products(first, key[:, :, :num_turned]), _products(stacked, key[:, :, num_turned:])
        scores = torch.cat(both, dim=-1)
    scores = scores.view(batch, num_heads, q_length, kv_length)
    weights = F.dropout(mask.softmax(scores), dropout)
    output = _sums(weights.view(batch, num_groups, -1, kv_length), value)
    return output.view(batch, num_heads, q_length, -1), None


def _products(query: Tensor, key: Tensor) -> Tensor:
    if not eight_bits.is_encoded(key):
        return query @ key.transpose(-1, -2)
    return torch.cat([query @ part.transpose(-1, -2) for _, part in eight_bits.blocks(key, query.dtype)], dim=-1)


def _sums(weights: Tensor, value: Tensor) -> Tensor:
    if not eight_bits.is_encoded(value):
        return weights @ value
    total = weights.new_zeros(*weights.shape[:-1], eight_bits.width(value))
    for where, part in eight_bits.blocks(value, weights.dtype):
        total += weights[..., where] @ part
    return total
