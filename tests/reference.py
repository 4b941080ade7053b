"""Slow attention written from the definitions, sharing no code with the library: what it must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1 written out."""
    return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0.0, x)))


def hedgehog(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`(B, H, N, d)` to `(B, H, N, 2 d)`; `weight` `(H, d, d)` (out, in), `bias` `(H, d)`."""
    mapped = torch.einsum("hed,bhnd->bhne", weight, x) + bias[None, :, None]
    halves = [torch.exp(half - half.detach().amax(-1, keepdim=True)) for half in (mapped, -mapped)]
    return torch.cat([half / half.sum(-1, keepdim=True) for half in halves], dim=-1)


def hybrid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    near: Tensor,
    *,
    scaling: float,
    phi_query: Callable[[Tensor], Tensor] = phi,
    phi_key: Callable[[Tensor], Tensor] = phi,
    kept_near: Tensor | float = 1.0,
    kept_far: Tensor | float = 1.0,
) -> Tensor:
    """Visible keys that are near (bool, broadcastable to `(B, H, Q, K)`) by e^score, the others by their features."""
    group = query.shape[1] // key.shape[1]
    heads = [head // group for head in range(query.shape[1])]
    score = torch.exp(torch.einsum("bhqd,bhkd->bhqk", query, key[:, heads]) * scaling)
    feature = torch.einsum("bhqf,bhkf->bhqk", phi_query(query), phi_key(key)[:, heads])
    total = (torch.where(near, score, feature) * visible).sum(-1, keepdim=True)
    p = torch.where(near, score * kept_near, feature * kept_far) * visible / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhqk,bhkd->bhqd", p, value[:, heads])


def weights(query: Tensor, key: Tensor, visible: Tensor, scaling: float, softmax: bool, bias: Tensor | None) -> Tensor:
    """`(B, H, Q, K)`; rows that see nothing are zero. `key` already has one head per query head."""
    if softmax:
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
        scores = scores if bias is None else scores + bias
        largest = torch.where(visible, scores.detach(), -torch.inf).amax(-1, keepdim=True)
        raw = torch.where(visible, torch.exp(torch.where(visible, scores - largest, 0.0)), 0.0)
    else:
        raw = torch.einsum("bhqd,bhkd->bhqk", phi(query), phi(key)) * visible
    total = raw.sum(-1, keepdim=True)
    return raw / torch.where(total > 0, total, 1.0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softmax: bool = True,
    bias: Tensor | None = None,
    kept: Tensor | float = 1.0,
) -> Tensor:
    """Query head h uses key/value head `h // group`; `kept` are dropout factors of the weights."""
    group = query.shape[1] // key.shape[1]
    heads = [head // group for head in range(query.shape[1])]
    p = weights(query, key[:, heads], visible, scaling, softmax, bias)
    return torch.einsum("bhqk,bhkd->bhqd", p * kept, value[:, heads])


# Patterns: which keys j a query i may see, by position, besides padding and causality. Shapes
# `(B, Q, 1)` and `(B, 1, K)`; `first` `(B, 1, 1)` is the position of the first real token.


def everything(i: Tensor, j: Tensor, first: Tensor) -> Tensor:
    return (i == i) & (j == j)


def window(size: int, i: Tensor, j: Tensor, first: Tensor) -> Tensor:
    return (i - j < size) & (j - i < size)


def window_and_global(size: int, number: int, i: Tensor, j: Tensor, first: Tensor) -> Tensor:
    return window(size, i, j, first) | (j < first + number) | ((i >= first) & (i < first + number))
