"""Sums of phi(k) v^T over keys, multiplied with phi(q): all keys, or a prefix that grows with the query.

    B batch   G key/value heads   H query heads   Q queries   K keys   F features   V columns of the values

queries `(B, H, Q, F)`, keys `(B, G, K, F)`, values `(B, G, K, V)`, result `(B, H, Q, V)`, a state
(the sum over some keys) `(B, G, F, V)`. All of one dtype, float32 or float64.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Tokens in a chunk, C. The causal form holds, per token and key/value head, F V / C numbers of chunk
# states and (H / G) C of products within the chunk, and as much again for the backward pass: linear
# in the length whatever C. Both terms are least together near C = sqrt(F V G / H), 64 to 180 for the
# head sizes in use, and matrix products this large run near full speed.
CHUNK = 128


def state_of(keys: Tensor, values: Tensor) -> Tensor:
    """Sum over all keys given: `(B, G, F, V)`."""
    return keys.transpose(-1, -2) @ values


def everything(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Every query sees every key."""
    return _apply(queries, state_of(keys, values))


def prefix(queries: Tensor, keys: Tensor, values: Tensor, end: int, state: Tensor | None = None) -> Tensor:
    """Query i sees the first `end + i` keys (none if negative, all if beyond), and `state` before them.

    Chunk by chunk: one state for what lies before the chunk, a small triangular product within.
    """
    num_groups, kv_length = keys.shape[1:3]
    length = queries.shape[2]
    # Key `begin + i` is the last that query i sees; `begin` may lie before the first key.
    begin = end - 1
    start = min(max(begin, 0), kv_length)
    stop = min(max(begin + length, start), kv_length)
    before = state_of(keys[:, :, :start], values[:, :, :start])
    if state is not None:
        before = before + state
    if start == stop:
        return _apply(queries, before)

    chunk = min(CHUNK, length)
    padded = length + -length % chunk
    left = min(max(-begin, 0), length)
    right = padded - left - (stop - start)
    keys, values = (
        F.pad(tensor[:, :, start:stop], (0, 0, left, right)).unflatten(2, (-1, chunk)) for tensor in (keys, values)
    )
    # "b (n g) (c i) f -> b n c (g i) f": the heads of a group as one tall matrix, so that neither
    # keys nor states are copied for each of them.
    tall = F.pad(queries, (0, 0, 0, padded - length)).unflatten(2, (-1, chunk)).unflatten(1, (num_groups, -1))
    tall = tall.transpose(2, 3).flatten(3, 4)

    sums = state_of(keys, values)  # (B, G, chunks, F, V)
    sums = before[:, :, None] + F.pad(sums[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))
    within = (tall @ keys.transpose(-1, -2)).unflatten(3, (-1, chunk)).tril().flatten(3, 4)
    result = (within @ values + tall @ sums).unflatten(3, (-1, chunk)).transpose(2, 3)
    return result.flatten(1, 2).flatten(2, 3)[:, :, :length]


def suffix(queries: Tensor, keys: Tensor, values: Tensor, begin: int) -> Tensor:
    """Query i sees the keys from `begin + i` on: `prefix` read backwards."""
    end = keys.shape[2] - begin - (queries.shape[2] - 1)
    return prefix(queries.flip(2), keys.flip(2), values.flip(2), end).flip(2)


def _apply(queries: Tensor, state: Tensor) -> Tensor:
    """phi(q) . state for every query."""
    stacked = queries.reshape(queries.shape[0], state.shape[1], -1, queries.shape[-1])
    return (stacked @ state).view(*queries.shape[:3], -1)
