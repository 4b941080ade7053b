"""Mean-pooling of heads, as defined."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled(parameter: Tensor, groups: int, head_dim: int = 8) -> Tensor:
    """The definition: row r of new head g is the mean of row r of the old heads of the group."""
    heads = parameter.shape[0] // head_dim
    group = heads // groups
    rows = []
    for g in range(groups):
        for r in range(head_dim):
            total = torch.zeros_like(parameter[0])
            for h in range(g * group, (g + 1) * group):
                total = total + parameter[h * head_dim + r]
            rows.append(total / group)
    return torch.stack(rows)
