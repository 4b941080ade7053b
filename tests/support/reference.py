"""Slow attention written from the definitions, sharing no code with the library: what it must equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def hedgehog_weighted(x: Tensor, weight: Tensor, bias: Tensor, weigh: Tensor | None, scale: Tensor | None) -> Tensor:
    """`hedgehog`, of keys e^(u . x + c) times, bounded by 20 tanh(. / 20) of it; `weigh` u, `scale` c `(H,)`."""
    if weigh is None or scale is None:
        return hedgehog(x, weight, bias)
    logarithm = torch.einsum("bhnd,hd->bhn", x, weigh) + scale[:, None]
    return hedgehog(x, weight, bias) * (20 * (logarithm / 20).tanh()).exp()[..., None]


def exponential(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """e^(W x + b), with an exponent bounded by 15 tanh(. / 15): `(B, H, N, d)` to `(B, H, N, out)`."""
    return torch.exp(15 * torch.tanh((torch.einsum("hed,bhnd->bhne", weight, x) + bias[None, :, None]) / 15))


def taylor(x: Tensor, weight: Tensor, bias: Tensor, weigh: Tensor | None = None) -> Tensor:
    """`(B, H, N, d)` to `(B, H, N, 1 + d + d^2)`: 1, a and all a_i a_j / sqrt(2), of a = W x + b; `key_weights` times.

    `weight` `(H, d, d)` (out, in), `bias` and `weigh` `(H, d)`.
    """
    a = torch.einsum("hed,bhnd->bhne", weight, x) + bias[None, :, None]
    pairs = torch.einsum("bhne,bhnf->bhnef", a, a).flatten(-2) / 2**0.5
    return torch.cat([torch.ones_like(a[..., :1]), a, pairs], dim=-1) * key_weights(x, weigh)


def key_weights(x: Tensor, weigh: Tensor | None) -> Tensor | float:
    """e^(u . x) with an exponent bounded by 12 tanh(. / 12), `(B, H, N, 1)`; 1 of queries."""
    return 1.0 if weigh is None else torch.exp(12 * torch.tanh((x * weigh[:, None]).sum(-1, keepdim=True) / 12))


def taylor_exponential(
    x: Tensor, weight: Tensor, bias: Tensor, weigh: Tensor | None, exponents: Tensor, start: Tensor
) -> Tensor:
    """`taylor` and e^(C x + g), bounded by 15 tanh(. / 15), `exponents` C and `start` g as W and b."""
    powers = exponential(x, exponents, start) * key_weights(x, weigh)
    return torch.cat([taylor(x, weight, bias, weigh), powers], dim=-1)


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
    gate: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Visible keys that are near (bool, broadcastable to `(B, H, Q, K)`) by e^score, the others by their features.

    `gate` `(H,)`: added to the scores. `factor` `(B, G, Q, K)`: of the features.
    """
    group = query.shape[1] // key.shape[1]
    heads = [head // group for head in range(query.shape[1])]
    score = torch.exp(torch.einsum("bhqd,bhkd->bhqk", query, key[:, heads]) * scaling)
    score = score if gate is None else score * torch.exp(gate)[:, None, None]
    feature = torch.einsum("bhqf,bhkf->bhqk", phi_query(query), phi_key(key)[:, heads])
    feature = feature if factor is None else feature * factor[:, heads]
    total = (torch.where(near, score, feature) * visible).sum(-1, keepdim=True)
    p = torch.where(near, score * kept_near, feature * kept_far) * visible / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhqk,bhkd->bhqd", p, value[:, heads])


def plain_hedgehog(x: Tensor) -> Tensor:
    """`hedgehog` at its start: weight 1, bias 0."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


def weights(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scaling: float,
    softmax: bool | Tensor,
    bias: Tensor | None,
    features: Callable[[Tensor], Tensor] = phi,
    factor: Tensor | None = None,
) -> Tensor:
    """`(B, H, Q, K)`; rows that see nothing are zero. `key` already has one head per query head.

    `softmax` says, by a bool matrix or for all, which keys count by e^score; the others by their features.
    """
    if softmax is True:
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
        scores = scores if bias is None else scores + bias
        largest = torch.where(visible, scores.detach(), -torch.inf).amax(-1, keepdim=True)
        raw = torch.where(visible, torch.exp(torch.where(visible, scores - largest, 0.0)), 0.0)
    else:
        raw = torch.einsum("bhqd,bhkd->bhqk", features(query), features(key))
        raw = raw if factor is None else raw * factor.to(raw.dtype)
        if isinstance(softmax, Tensor):
            scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
            near = softmax & visible
            # Exponentials in float32, as Transformers' eager softmax: e^-45 has no float16.
            exact = torch.promote_types(query.dtype, torch.float32)
            scores, raw = scores.to(exact), raw.to(exact)
            largest = torch.where(near, scores.detach(), 0.0).amax(-1, keepdim=True)
            near_raw = torch.exp(torch.where(near, scores - largest, 0.0))
            raw = torch.where(softmax, near_raw, raw * torch.exp(-largest))
        raw = raw * visible
    total = raw.sum(-1, keepdim=True)
    return (raw / torch.where(total > 0, total, 1.0)).to(query.dtype)


def starting_decay(num_key_value_heads: int) -> Tensor:
    """What a token leaves of a state that has learned nothing: memories of 16 to 4,096 tokens, `(G,)`."""
    last = num_key_value_heads - 1
    bias = [math.log(2 ** (4 + 8 * g / last if last else 8) - 1) for g in range(num_key_value_heads)]
    return torch.tensor(bias).double().sigmoid()  # parameters are made in float32


def tokens_between(seen: Tensor, own: Tensor) -> Tensor:
    """How many real tokens there are between query and key, the query among them and the key not: `(B, 1, Q, K)`.

    Args:
        seen: `(B or 1, 1, Q or 1, K)`, what each query sees of a text.
        own: `(B or 1, Q)`, each query's place among the keys.
    """
    batch = max(len(seen), len(own))
    seen = seen.expand(batch, 1, own.shape[1], -1)
    own = own.expand(batch, -1)[:, None, :, None]
    until = seen.cumsum(-1)
    before = until - seen.long()
    past = until.gather(-1, own) - until
    future = before - before.gather(-1, own)
    return torch.where(torch.arange(seen.shape[-1]) <= own, past, future)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softmax: bool | Tensor = True,
    bias: Tensor | None = None,
    kept: Tensor | float = 1.0,
    features: Callable[[Tensor], Tensor] = phi,
    factor: Tensor | None = None,
) -> Tensor:
    """Query head h uses key/value head `h // group`; `kept` are dropout factors of the weights, `factor` those of the
    features' products."""
    group = query.shape[1] // key.shape[1]
    heads = [head // group for head in range(query.shape[1])]
    p = weights(query, key[:, heads], visible, scaling, softmax, bias, features, factor)
    return torch.einsum("bhqk,bhkd->bhqd", p * kept, value[:, heads])


@dataclass(frozen=True)
class Text:
    """Where queries and keys stand.

    Attributes:
        i, j: positions of queries `(B, Q, 1)` and keys `(B, 1, K)`.
        first, last: `(B, 1, 1)`, of the first and the last real token.
    """

    i: Tensor
    j: Tensor
    first: Tensor
    last: Tensor
    is_causal: bool


# Patterns: which keys j a query i may see, besides padding and causality.


def everything(text: Text) -> Tensor:
    return (text.i == text.i) & (text.j == text.j)


def window(size: int, text: Text) -> Tensor:
    return (text.i - text.j < size) & (text.j - text.i < size)


def window_and_sinks(size: int, number: int, text: Text) -> Tensor:
    return window(size, text) | (text.j < text.first + number)


def window_and_global(size: int, number: int, text: Text) -> Tensor:
    return window_and_sinks(size, number, text) | ((text.i >= text.first) & (text.i < text.first + number))


def window_and_random(size: int, number: int, per_block: int, block: int, seed: int, text: Text) -> Tensor:
    """A block of queries sees `per_block` of the other blocks of its row, of those before it if causal."""
    seen = window_and_global(size, number, text)
    batch = max(seen.shape[0], text.first.shape[0])
    i, j, first, last = (x.expand(batch, -1, -1) for x in (text.i, text.j, text.first, text.last))
    linked = torch.zeros(batch, i.shape[1], j.shape[2], dtype=torch.bool)
    for row in range(batch):
        blocks = (int(last[row]) - int(first[row])) // block + 1
        of_query, of_key = ((x[row] - first[row]).div(block, rounding_mode="floor") for x in (i, j))
        for own in range(blocks):
            others = list(range(own)) if text.is_causal else [other for other in range(blocks) if other != own]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + own)
            for drawn in torch.randperm(len(others), generator=generator)[:per_block].tolist():
                linked[row] |= (of_query == own) & (of_key == others[drawn])
    return seen | linked
