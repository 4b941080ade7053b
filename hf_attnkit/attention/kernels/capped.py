"""Softmax attention whose scores are capped (Gemma 2) or whose softmax has learned sinks (gpt-oss).

    s = cap * tanh(scaling * q . k / cap)                    out_i = sum_j e^s_ij v_j / (e^sink + sum_j e^s_ij)

A sink is one more key, the same for all queries of a head, with a score that is learned and no value. Both are
functions of the score, so whatever keys a kind sees, they apply. The scores are formed, block by block of queries:
with a window this costs what all keys cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kernels.tiles import product
from hf_attnkit.attention.mask import Mask

BLOCK_NUMBERS = 2**25  # scores that are formed at a time


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend. Shapes as in `Kind.attention`.

    Args:
        mask: what each query sees, the kind's pattern included.
        softcap: bound of the scaled scores, before a bias; `None` for none.
        sinks: `(num_heads,)`, in units of the scaled scores; `None` for none.

    Returns:
        `(B, num_heads, Q, value_head_dim)`, differentiable, also in the sinks; 0 for a query that sees no key.
    """
    batch, num_heads, length, _ = query.shape
    size = max(1, BLOCK_NUMBERS // (batch * num_heads * key.shape[2]))
    parts = []
    for start in range(0, length, size):
        queries = slice(start, min(start + size, length))
        scores = product(query[:, :, queries] * scaling, key)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if mask.bias is not None:
            scores = scores + mask.bias[..., queries if mask.bias.shape[-2] > 1 else slice(None), :]
        visible = mask.visible(queries)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, scores.shape[2], 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights if visible is None else weights.masked_fill(~visible, 0.0)
        weights = F.dropout(weights, dropout).to(value.dtype)
        stacked = weights.view(batch, key.shape[1], -1, key.shape[2]) @ value
        parts.append(stacked.view(batch, num_heads, -1, value.shape[-1]))
    return torch.cat(parts, 2)
