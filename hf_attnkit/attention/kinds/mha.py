"""Multi-head attention (Vaswani et al. 2017): the readable reference, and the kind that returns weights.

    softmax(scaling * Q K^T) V        one key/value head per query head

On a model with grouped heads every key/value head is repeated for the queries of its group, so that
the formula stays that of the paper; `gqa` computes the same without the copies.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.mask import Mask

OWN_WINDOW = RETURNS_WEIGHTS = True


def check(num_heads: int, num_key_value_heads: int) -> None:
    """Any number of heads is fine."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: `(batch, num_heads, queries, head_dim)`.
        key, value: `(batch, num_key_value_heads, keys, head_dim)`.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        The output `(batch, num_heads, queries, head_dim)` and the weights
        `(batch, num_heads, queries, keys)`, after dropout as in Transformers' eager attention.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    # Scaled before the product, so that in 16 bits no score overflows that would not once scaled.
    weights = mask.softmax(query * scaling @ key.transpose(-1, -2))
    weights = F.dropout(weights, dropout)
    return weights @ value, weights
