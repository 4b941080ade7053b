"""Exponentials whose sums stay within float32."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.attention.kernels.feature_maps.wide import wide

# Of ln w(k): e^12 is 160,000, and sums of float32 keep their digits.
MOST_OF_A_KEY = 12.0


def bounded_exp(x: Tensor, most: float) -> Tensor:
    """e^x, with x led smoothly to at most `most` and at least `-most`, so that a gradient is left everywhere.

    Args:
        x: overwritten where no gradient is taken: memory for features takes as long as computing them.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return (most * (x / most).tanh()).exp()
    return x.div_(most).tanh_().mul_(most).exp_()


def weighted(features: Tensor, weights: Tensor) -> Tensor:
    """The product, in the memory of the features where no gradient is taken."""
    if torch.is_grad_enabled() and (features.requires_grad or weights.requires_grad):
        return features * weights
    return features.mul_(weights)


def key_weights(x: Tensor, weigh: Tensor) -> Tensor:
    """w(k) = e^(u . k) of keys `(batch, heads, tokens, head_dim)`, `(batch, heads, tokens, 1)`.

    Args:
        weigh: u, `(heads, head_dim)`.
    """
    x = wide(x)
    logarithm = torch.einsum("bhnd,hd->bhn", x, weigh.to(x.dtype))[..., None]
    return bounded_exp(logarithm, MOST_OF_A_KEY)
