"""Hedgehog's features, and a learned weight of each key:

    phi(q) . phi(k) = w(k) hedgehog(q) . hedgehog(k),     w(k) = e^(u . k + c)

Hedgehog gives every key at most 2, so it cannot follow a key that takes most of the attention from all queries, as the
first token of a text does in many decoders. `2 * head_dim` features. W, b, u and c are learned for every head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.bounded import bounded_exp
from hf_attnkit.attention.kernels.feature_maps.hedgehog import HedgehogMap
from hf_attnkit.attention.kernels.feature_maps.wide import wide

MOST = 20.0  # of ln w(k)


class WeightedKeyMap(HedgehogMap):
    """One map per key/value head: `(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, 2 * head_dim)`."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Starts as Hedgehog with w = head_dim / 2, so that features that know nothing count 1, as a score of 0 does in
        a window."""
        super().__init__(num_heads, head_dim)
        self.weigh = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.scale = nn.Parameter(torch.full((num_heads,), math.log(head_dim / 2)))

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        x = wide(x)
        logarithm = torch.einsum("bhnd,hd->bhn", x, self.weigh.to(x.dtype)) + self.scale.to(x.dtype)[:, None]
        return features * bounded_exp(logarithm, MOST)[..., None]


class WeightedHedgehog(nn.Module):
    """The maps of one layer: `query` for its query heads, `key` for its key/value heads."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = HedgehogMap(num_heads, head_dim)
        self.key = WeightedKeyMap(num_key_value_heads, head_dim)
