"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), cost linear in the sequence length.

The softmax is replaced by a product of positive features, phi(x) = elu(x) + 1, so that sums over
keys can be taken before the query is known:

    out_i = phi(q_i) . S_i / (phi(q_i) . z_i),     S_i = sum_j phi(k_j) v_j^T,     z_i = sum_j phi(k_j)

over all keys (bidirectional) or the keys up to i (causal). The causal form goes chunk by chunk: one
state for the chunks before, a small masked product within the chunk.

It is a different function than softmax attention: a pretrained softmax model needs training after
the swap. As in the paper, queries and keys are not scaled by `head_dim ** -0.5`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import Mask

NEEDS_TRANSFER = True
SELF_ATTENTION_ONLY = True  # the causal sums take queries and keys of one sequence
NO_SCORES = True
CHUNK = 64


def check(num_heads: int, num_key_value_heads: int) -> None:
    """Any number of heads is fine."""


def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, positive; in float32 or better because sums over the sequence follow."""
    return F.elu(x if x.dtype == torch.float64 else x.float()) + 1


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `mha.attention`; returns no weights.

    There are no attention weights to drop, so `dropout` drops a key's value for all queries alike,
    as weight dropout would if its mask were shared over queries; the normaliser is kept.

    Raises:
        ValueError: for a full attention matrix, which features summed over keys cannot apply.
    """
    if mask.dense is not None:
        raise ValueError(
            "'linear' cannot apply a full (queries x keys) attention mask; pass a 2-D padding mask, do not pack "
            "sequences, and set config.sliding_window to None"
        )
    batch, num_heads, q_length, _ = query.shape
    num_groups, kv_length = key.shape[1], key.shape[2]
    queries, keys = feature_map(query), feature_map(key)
    if mask.key_visible is not None:
        keys = keys * mask.key_visible[:, None, :, None]
    values = F.dropout(value.to(keys.dtype).new_ones(batch, num_groups, kv_length, 1), dropout) * value.to(keys.dtype)
    # A last column of ones carries the normaliser through the same sums as the values.
    values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], dim=-1)

    stacked = queries.view(batch, num_groups, -1, q_length, queries.shape[-1])
    if mask.is_causal:
        result = _causal(stacked, keys, values, mask.offset())
    else:
        state = keys.transpose(-1, -2) @ values
        result = stacked @ state[:, :, None]
    output, total = result[..., :-1], result[..., -1:]
    # Features are positive, so a zero total means that the query sees no key.
    output = output / total.masked_fill(total == 0, 1.0)
    return output.reshape(batch, num_heads, q_length, -1).to(query.dtype), None


def _causal(queries: Tensor, keys: Tensor, values: Tensor, offset: int) -> Tensor:
    """`(batch, groups, heads, Q, d)`: query i sees the keys 0 .. offset + i."""
    q_length = queries.shape[-2]
    state = keys[:, :, :offset].transpose(-1, -2) @ values[:, :, :offset]
    keys, values = keys[:, :, offset : offset + q_length], values[:, :, offset : offset + q_length]

    pad = -q_length % CHUNK if q_length > CHUNK else 0
    chunk = min(CHUNK, q_length)
    queries, keys, values = (F.pad(t, (0, 0, 0, pad)).unflatten(-2, (-1, chunk)) for t in (queries, keys, values))
    sums = keys.transpose(-1, -2) @ values  # (batch, groups, chunks, d, d_v)
    before = state[:, :, None] + F.pad(sums.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
    within = (queries @ keys[:, :, None].transpose(-1, -2)).tril() @ values[:, :, None]
    return (within + queries @ before[:, :, None]).flatten(-3, -2)[..., :q_length, :]
