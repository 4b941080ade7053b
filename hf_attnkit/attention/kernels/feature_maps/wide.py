"""The dtype of features: sums over the sequence follow, so float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()
