"""phi(x) = [softmax(W x + b), softmax(-(W x + b))] (Hedgehog, Zhang et al. 2024, arXiv 2402.04347).

`2 * head_dim` features. W and b are learned for every head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.affine import Affine
from hf_attnkit.attention.kernels.feature_maps.wide import wide


class HedgehogMap(Affine):
    """One map per head: `(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, 2 * head_dim)`.

    The features are the paper's exp(W x + b) and exp(-(W x + b)) in its numerically stable form,
    each half divided by its sum. x is the query or key as the model makes it (after RoPE), not
    scaled by `head_dim ** -0.5`: in the paper W takes the scale, as it must be learned anyway.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Starts as W = identity, b = 0."""
        super().__init__(torch.eye(head_dim), num_heads)

    def forward(self, x: Tensor) -> Tensor:
        mapped = super().forward(wide(x))
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)


class Hedgehog(nn.Module):
    """The maps of one layer: `query` for its query heads, `key` for its key/value heads."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = HedgehogMap(num_heads, head_dim)
        self.key = HedgehogMap(num_key_value_heads, head_dim)
