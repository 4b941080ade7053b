"""Linear attention with a softmax window (Based, arXiv 2402.18668; LoLCATs, Zhang et al. 2024, arXiv 2410.10254).

The nearest keys count with their softmax terms, all others with their features, and one sum
normalises both, so every key is counted exactly once:

              sum_near e^(s_ij) v_j  +  sum_far phi(q_i) . phi(k_j) v_j
    out_i  =  ---------------------------------------------------------      s_ij = scaling * q_i . k_j
              sum_near e^(s_ij)      +  sum_far phi(q_i) . phi(k_j)

    causal, window 3           bidirectional, window 2      x near, . far
    0 x                        0 x x . . .
    1 x x                      1 x x x . .
    2 x x x                    2 . x x x .
    3 . x x x                  3 . . x x x
    4 . . x x x                4 . . . x x
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_attnkit.attention.kernels import linear_sums
from hf_attnkit.attention.kernels.feature_maps import Map


def outside(query: Tensor, phi: Map, keys: linear_sums.Keys, offset: int, window: int) -> Iterator[Tensor]:
    """Bidirectional: sums over the keys `window` or more before and after each query; query 0 is
    at key `offset`. Two sums, since all keys less those of the window would cancel."""
    after = linear_sums.suffix(query, phi, keys, offset + window)
    start = 0
    for before in linear_sums.prefix(query, phi, keys, offset - window, linear_sums.LinearState()):
        stop = start + before.shape[2]
        yield before + after[:, :, start:stop]
        start = stop


def join(far: Tensor, total: Tensor, near: Tensor, logsumexp: Tensor) -> Tensor:
    """Both parts under one normaliser.

    With T = `total` and L the log-sum-exp of the window, the formula above is a mean of the two
    normalised parts, the window's weight being e^L / (e^L + T) = sigmoid(L - ln T): no exponential
    of a score is ever formed, so none overflows.

    Args:
        far: `(B, H, Q, D)`, the linear part, normalised on its own; 0 where there is none.
        total: `(B, H, Q, 1)`, its normaliser; 0 where there is none.
        near: `(B, H, Q, D)`, the window's softmax attention; 0 where it is empty.
        logsumexp: `(B, H, Q)`; -inf where the window is empty.
    """
    some = total > 0
    share = torch.sigmoid(logsumexp[..., None].to(far.dtype) - total.masked_fill(~some, 1.0).log())
    return torch.lerp(far, near.to(far.dtype), share.masked_fill(~some, 1.0))
