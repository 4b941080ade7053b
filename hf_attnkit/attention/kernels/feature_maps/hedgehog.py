"""phi(x) = [softmax(W x + b), softmax(-(W x + b))] (Hedgehog, Zhang et al. 2024, arXiv 2402.04347).

`2 * head_dim` features. W and b are learned for every head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.wide import wide


class HedgehogMap(nn.Module):
    """One map per head: `(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, 2 * head_dim)`.

    The features are the paper's exp(W x + b) and exp(-(W x + b)) in its numerically stable form,
    each half divided by its sum. x is the query or key as the model makes it (after RoPE), not
    scaled by `head_dim ** -0.5`: in the paper W takes the scale, as it must be learned anyway.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Starts as W = identity, b = 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))  # (heads, out, in)
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape[1], x.shape[3]) != tuple(self.bias.shape):
            raise ValueError(
                f"the Hedgehog map was made for {self.bias.shape[0]} heads of size {self.bias.shape[1]} and got "
                f"{x.shape[1]} heads of size {x.shape[3]}; make a new one for the layer as it is now"
            )
        x = wide(x)
        mapped = torch.einsum("bhnd,hed->bhne", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)[:, None]
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)


class Hedgehog(nn.Module):
    """The maps of one layer: `query` for its query heads, `key` for its key/value heads."""

    def __init__(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.query = HedgehogMap(num_heads, head_dim)
        self.key = HedgehogMap(num_key_value_heads, head_dim)
