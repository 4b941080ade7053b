"""The Taylor series of `taylor`, and learned exponentials for what is too sharp for it.

    phi(q) . phi(k) = w(k) (1 + s + s^2 / 2  +  sum_f e^(c_f(q) + d_f(k))),     c(q) = C q + g,   d(k) = D k + h

A polynomial spreads attention, as many heads do, and cannot follow a score that stands out; the exponentials can, as
Hedgehog's do, without a bound for a key. There are head_dim of them next to the features of `taylor`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.affine import Affine
from hf_attnkit.attention.kernels.feature_maps.bounded import bounded_exp
from hf_attnkit.attention.kernels.feature_maps.taylor import TaylorMap, grouped_products, series
from hf_attnkit.attention.kernels.feature_maps.wide import wide

# Of an exponent, which is led there smoothly. A product of two features is then below e^30, far from overflow.
MOST = 15.0


class TaylorExponentialMap(nn.Module):
    """One map per head: `(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, features)`."""

    def __init__(self, num_heads: int, head_dim: int, weighs: bool) -> None:
        """Starts as `taylor` does, with directions of cosines for the exponentials, whose products sum to about 1 for
        a query and a key of 0."""
        super().__init__()
        self.taylor = TaylorMap(num_heads, head_dim, weighs)
        steps = torch.arange(head_dim)
        cosines = torch.cos(math.pi / head_dim * (steps + 0.5) * (steps + 0.5)[:, None]) * (2 / head_dim) ** 0.5
        self.exponents = Affine(cosines * head_dim**0.25, num_heads, bias=-0.5 * math.log(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        return torch.cat([self.taylor(x), self.exponentials(x)], dim=-1)

    def exponentials(self, x: Tensor) -> Tensor:
        """e^c(q), or w(k) e^d(k), `(batch, heads, tokens, head_dim)`."""
        return bounded_exp(self.exponents(x), MOST) * self.taylor.weights(x)


class TaylorExponential(nn.Module):
    """The maps of one layer: `query` for its query heads, `key` for its key/value heads."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = TaylorExponentialMap(num_heads, head_dim, weighs=False)
        self.key = TaylorExponentialMap(num_key_value_heads, head_dim, weighs=True)
        self.num_features = 1 + head_dim + head_dim * (head_dim // 2 + 1) + head_dim

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """phi(q) . phi(k) without the features of the series: `(batch, num_heads, queries, keys)`."""
        query, key = wide(query), wide(key)
        exponentials = grouped_products(self.query.exponentials(query), self.key.exponentials(key))
        return series(self.query.taylor, self.key.taylor, query, key) + exponentials
