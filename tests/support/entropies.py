"""Attention entropy, as defined."""

from __future__ import annotations

import torch
from support.reference import weights
from torch import Tensor


def definition(query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    heads = [head // group for head in range(query.shape[1])]
    p = weights(query.double(), key.double()[:, heads], visible, scaling, True, None)
    return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
