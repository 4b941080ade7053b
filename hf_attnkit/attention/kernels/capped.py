"""Softmax attention whose scores are capped (Gemma 2) or whose softmax has learned sinks (gpt-oss).

    s = cap * tanh(scaling * q . k / cap)                    out_i = sum_j e^s_ij v_j / (e^sink + sum_j e^s_ij)

A sink is one more key, the same for all queries of a head, with a score that is learned and no value. Both are
functions of the score, so whatever keys a kind sees, they apply. The matrix of weights is formed: with a window this
costs what all keys cost.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kernels.tiles import product
from hf_attnkit.attention.mask import Mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend. Shapes as in `Kind.attention`.

    Args:
        mask: what each query sees, the kind's pattern included, with `softcap` and `sinks`.

    Returns:
        The output `(B, num_heads, Q, value_head_dim)`, differentiable, also in the sinks; 0 for a query that sees no
        key. And the weights `(B, num_heads, Q, K)`.
    """
    batch, num_heads, length, _ = query.shape
    weights = mask.softmax(product(query * scaling, key))
    weights = F.dropout(weights, dropout).to(value.dtype)
    output = weights.view(batch, key.shape[1], -1, key.shape[2]) @ value
    return output.view(batch, num_heads, length, -1), weights
