"""The second-order Taylor series of the exponential, learned (Based, Arora et al. 2024, arXiv 2402.18668).

    phi(q) . phi(k) = w(k) (1 + s + s^2 / 2),     s = a(q) . a(k),   a(x) = A x + b,   w(k) = e^(u . k)

which is at least w(k) / 2. In the paper s is the score itself; here A, b and u are learned for every head, so that a
head can be sharper than the series at its score, and can weigh keys whatever the query is. With r = head_dim there are
1 + r + r (r // 2 + 1) features: 577 at 32, 2,177 at 64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.affine import Affine
from hf_attnkit.attention.kernels.feature_maps.bounded import key_weights
from hf_attnkit.attention.kernels.feature_maps.wide import wide


class TaylorMap(nn.Module):
    """One map per head: `(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, features)`."""

    def __init__(self, num_heads: int, head_dim: int, weighs: bool) -> None:
        """Starts as the series at the usual scaling: A = head_dim ** -0.25 times the identity, b = 0, u = 0.

        Args:
            weighs: whether it has the weights w, as keys have.
        """
        super().__init__()
        self.project = Affine(torch.eye(head_dim) * head_dim**-0.25, num_heads)
        self.weigh = nn.Parameter(torch.zeros(num_heads, head_dim)) if weighs else None

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        a = self.project(x)
        return torch.cat([torch.ones_like(a[..., :1]), a, _squares(a)], dim=-1) * self.weights(x)

    def weights(self, x: Tensor) -> Tensor:
        """w, `(batch, heads, tokens, 1)`; 1 for queries."""
        return x.new_ones(1) if self.weigh is None else key_weights(x, self.weigh)


def _squares(a: Tensor) -> Tensor:
    """Features `(..., r (r // 2 + 1))` of which the product is s^2 / 2, the sum over i of (a_i^2)^2 / 2 and over pairs
    i < j of (a_i a_j)^2.

    Every entry times the one that is t further round, for t from 0 to r / 2: all pairs, without an index for each,
    of which the gradient would be slow. At r / 2 a pair comes twice, so it counts half, as the squares do.
    """
    size = a.shape[-1]
    half = size // 2
    turned = torch.cat([a, a[..., :half]], dim=-1).unfold(-1, size, 1)  # (..., r // 2 + 1, r)
    factors = a.new_ones(half + 1, 1)
    factors[0] = 0.5**0.5
    if size % 2 == 0:
        factors[half] *= 0.5**0.5
    return (turned * (a[..., None, :] * factors)).flatten(-2)


class Taylor(nn.Module):
    """The maps of one layer: `query` for its query heads, `key` for its key/value heads."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = TaylorMap(num_heads, head_dim, weighs=False)
        self.key = TaylorMap(num_key_value_heads, head_dim, weighs=True)
        self.num_features = 1 + head_dim + head_dim * (head_dim // 2 + 1)

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """phi(q) . phi(k) from s, without the features: `(batch, num_heads, queries, keys)`."""
        return series(self.query, self.key, wide(query), wide(key))


def series(query_map: TaylorMap, key_map: TaylorMap, query: Tensor, key: Tensor) -> Tensor:
    """w(k) (1 + s + s^2 / 2), `(batch, num_heads, queries, keys)`."""
    s = grouped_products(query_map.project(query), key_map.project(key))
    weights = key_map.weights(key).transpose(-1, -2).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (1 + s + s.square() / 2) * weights


def grouped_products(query: Tensor, key: Tensor) -> Tensor:
    """q . k, `(batch, num_heads, queries, keys)`, each key/value head's keys with the query heads that share it."""
    return (query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-1, -2)).flatten(1, 2)
