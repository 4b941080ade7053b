"""Sliding-window attention (Beltagy et al. 2020; Mistral 7B, Jiang et al. 2023), cost n * window.

A window of W keeps W keys on each side of a query, the query's own key counted:

    causal, W = 3          bidirectional, W = 3
    0 x                    0 x x x
    1 x x                  1 x x x x
    2 x x x                2 x x x x x
    3   x x x              3   x x x x
    4     x x x            4     x x x

The queries are cut into blocks; the keys that a block can see are one overlapping slice ("band"),
so what lies outside the window is never computed, forward or backward:

    queries  [ block 0 ][ block 1 ][ block 2 ]
    keys   (pad)---------]          each band: W - 1 keys before, the block, and if
                  [---------------] bidirectional W - 1 keys after
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gqa
from .mask import Mask

SELF_ATTENTION_ONLY = True  # a window is a distance within one sequence


def check(num_heads: int, num_key_value_heads: int, *, window: int) -> None:
    """Raises `ValueError` unless `window` is an integer of at least 1."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(
            f"window={window!r} must be an integer of at least 1: the number of keys, the own one included"
        )


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, window: int, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attend within the window.

    Shapes as in `mha.attention`; returns no weights. A window longer than the sequence is full
    attention. A `mask.dense` matrix is already quadratic, so it takes the dense path.

    Args:
        window: number of keys that a query sees on each side, its own included.
    """
    if mask.dense is not None or key.shape[2] <= 2 * window or query.shape[2] == 1:
        return gqa.attention(query, key, value, _dense(mask, window), scaling=scaling, dropout=dropout)
    return _banded(query, key, value, mask, window, scaling, dropout), None


def _dense(mask: Mask, window: int) -> Mask:
    return mask.also(mask.distance().abs() < window)


def _banded(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, window: int, scaling: float, dropout: float
) -> Tensor:
    batch, num_heads, q_length, head_dim = query.shape
    num_groups, kv_length = key.shape[1], key.shape[2]
    block = min(max(window, 16), q_length)  # tiny windows would make the matrix products tiny too
    num_blocks = -(-q_length // block)
    before, after = window - 1, 0 if mask.is_causal else window - 1
    band = before + block + after

    # Band i begins at key `start + i * block`; keys outside the sequence are padding.
    start = mask.offset() - before
    end = start + (num_blocks - 1) * block + band

    def bands(tensor: Tensor) -> Tensor:
        """`(..., K, d)` -> `(..., num_blocks, band, d)`; negative padding cuts."""
        padded = F.pad(tensor, (0, 0, -start, end - kv_length))
        return padded.unfold(-2, band, block).transpose(-1, -2)

    seen = torch.ones(1, kv_length, dtype=torch.bool, device=key.device)
    seen = seen if mask.key_visible is None else mask.key_visible
    seen = bands(seen[..., None]).squeeze(-1)  # (B, num_blocks, band)
    steps = torch.arange(block, device=key.device)[:, None] + before - torch.arange(band, device=key.device)
    near = (steps < window) & (steps > (-1 if mask.is_causal else -window))  # (block, band)
    visible = (near & seen[:, :, None, :])[:, None, :, None]  # (B, 1, num_blocks, 1, block, band)

    queries = F.pad(query * scaling, (0, 0, 0, num_blocks * block - q_length))
    queries = queries.view(batch, num_groups, -1, num_blocks, block, head_dim).transpose(2, 3)
    stacked = queries.reshape(batch, num_groups, num_blocks, -1, head_dim)  # b n (g) blocks -> (g block)
    scores = stacked @ bands(key).transpose(-1, -2)
    scores = scores.view(batch, num_groups, num_blocks, -1, block, band)
    dtype = scores.dtype
    scores = scores.float() if dtype in (torch.float16, torch.bfloat16) else scores
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    weights = F.dropout(weights.masked_fill(~visible, 0.0).to(dtype), dropout)
    output = weights.view(batch, num_groups, num_blocks, -1, band) @ bands(value)
    output = output.view(batch, num_groups, num_blocks, -1, block, value.shape[-1]).transpose(2, 3)
    return output.reshape(batch, num_heads, num_blocks * block, -1)[:, :, :q_length]
