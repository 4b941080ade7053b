"""Two softmax parts under one normaliser: a window, and a few keys that meet queries of their own.

The queries of the few keys are the same queries at other positions, see `rotation`. With the window's output o and
log-sum-exp l, and scores s of the few keys with values v:

    out = (e^l o + sum_j e^(s_j) v_j) / (e^l + sum_j e^(s_j))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.eight_bits import decode
from hf_attnkit.attention.kernels import tiled
from hf_attnkit.attention.kernels.tiles import Extra, product, stack_groups
from hf_attnkit.attention.mask import Mask


def attend(
    query: Tensor,
    turned: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    extra: Extra,
    *,
    scaling: float,
    dropout: float,
    window: int,
) -> Tensor:
    """Attend; differentiable. Arguments as `tiled.attend`, with one tile of extra keys for all queries.

    Args:
        turned: the queries that the extra keys meet, `(B, num_heads, Q, head_dim)`.
    """
    near, total = tiled.attend(query, key, value, mask, scaling=scaling, dropout=dropout, window=window)
    scores = product(turned * scaling, decode(extra.key[:, :, 0], query.dtype))
    far = mask.query_position[:, :, None] - (mask.key_position[:, :1, None] + extra.index[:, 0, None, :]) >= window
    hidden = ~(far & extra.visible[:, :1])[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    top = torch.maximum(scores.amax(-1), total).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights, rest = (scores - top[..., None]).exp(), (total - top).exp()[..., None]
    values = decode(extra.value[:, :, 0], query.dtype).to(weights.dtype)
    parts = (stack_groups(F.dropout(weights, dropout), key.shape[1]) @ values).view(*query.shape[:3], -1)
    summed = weights.sum(-1, keepdim=True) + rest
    output = (parts + rest * near) / summed.masked_fill(summed == 0, 1.0)
    return output.to(query.dtype)
