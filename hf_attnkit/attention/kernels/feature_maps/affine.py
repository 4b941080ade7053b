"""W x + b, with a W and a b for every head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """`(batch, heads, tokens, head_dim)` to `(batch, heads, tokens, out)`.

    Args:
        start: `(out, head_dim)`, what each W starts as.
        bias: what each entry of b starts as.

    Raises:
        ValueError: in a call, for another number of heads or another head size.
    """

    def __init__(self, start: Tensor, num_heads: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.repeat(num_heads, 1, 1))  # (heads, out, in)
        self.bias = nn.Parameter(start.new_full((num_heads, len(start)), bias))

    def forward(self, x: Tensor) -> Tensor:
        made = (self.weight.shape[0], self.weight.shape[2])
        if (x.shape[1], x.shape[3]) != made:
            raise ValueError(
                f"the feature map was made for {made[0]} heads of size {made[1]} and got {x.shape[1]} heads of size "
                f"{x.shape[3]}; make a new one for the layer as it is now"
            )
        product = torch.einsum("bhnd,hed->bhne", x, self.weight.to(x.dtype))
        bias = self.bias.to(x.dtype)[:, None]
        if torch.is_grad_enabled() and (product.requires_grad or bias.requires_grad):
            return product + bias
        return product.add_(bias)
