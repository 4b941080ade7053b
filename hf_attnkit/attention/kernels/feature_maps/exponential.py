"""Exponentials of learned projections, positive as Performer's (Choromanski et al. 2021, arXiv 2009.14794).

    phi(q) . phi(k) = w(k) sum_f e^(c_f(q) + d_f(k)),     c(q) = C q + g,   d(k) = D k + h,   w(k) = e^(u . k)

Performer draws the projections and subtracts |x|^2 / 2, so that the sum is the exponential of the score on average.
Here all are learned for every head, so 8 head_dim of them do what thousands of random ones would have to. A head can
follow a key that stands out for one query alone, as heads that compare two sentences do. D could give what w gives;
with u, which all features share, a head learns it in fewer steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.affine import Affine
from hf_attnkit.attention.kernels.feature_maps.bounded import bounded_exp, key_weights, weighted
from hf_attnkit.attention.kernels.feature_maps.wide import wide

TIMES = 8  # features of each entry of a head
# Of an exponent, which is led there smoothly. With w a product of two features is below e^42, far from overflow.
MOST = 15.0


class ExponentialMap(Affine):
    """One map per head: `(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, 8 * head_dim)`."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Starts with Performer's projections, the same draw for each head, at the usual scaling; b makes the product
        of a query and a key of 0 one."""
        features = TIMES * head_dim
        drawn = torch.randn(features, head_dim, generator=torch.Generator().manual_seed(0), device="cpu")
        start = (drawn * head_dim**-0.25).to(torch.get_default_device())
        super().__init__(start, num_heads, bias=-0.5 * math.log(features))

    def forward(self, x: Tensor) -> Tensor:
        return bounded_exp(super().forward(wide(x)), MOST)


class WeightedKeyMap(ExponentialMap):
    """`ExponentialMap` times w(k)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Starts with u = 0."""
        super().__init__(num_heads, head_dim)
        self.weigh = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return weighted(super().forward(x), key_weights(x, self.weigh))


class Exponential(nn.Module):
    """The maps of one layer: `query` for its query heads, `key` for its key/value heads."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = ExponentialMap(num_heads, head_dim)
        self.key = WeightedKeyMap(num_key_value_heads, head_dim)
