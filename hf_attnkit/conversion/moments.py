"""Products with a second moment E[x x^T]: a matrix `(m, m)`, or its diagonal `(m,)` where it is one.

The last entry of x is the constant 1. Inputs that nobody looked at have the identity, whose products
cost nothing: a matrix of 4,097 columns would take 128 MiB and most of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times(rows: Tensor, moment: Tensor) -> Tensor:
    """`rows @ moment` for real or complex rows `(..., m)`."""
    if moment.dim() == 1:
        return rows * moment
    if rows.is_complex():  # two real products: half the work of a complex one, and no complex copy of the moment
        return torch.complex(rows.real @ moment, rows.imag @ moment)
    return rows @ moment


def mean(moment: Tensor) -> Tensor:
    """E[x], `(m,)`: the column of the 1."""
    if moment.dim() == 2:
        return moment[:, -1]
    return torch.cat([torch.zeros_like(moment[:-1]), moment[-1:]])


def covariance(moment: Tensor) -> Tensor:
    """E[x x^T] - E[x] E[x]^T; its last row and column, those of the 1, are zero."""
    if moment.dim() == 2:
        return torch.addr(moment, mean(moment), mean(moment), alpha=-1)
    return torch.cat([moment[:-1], torch.zeros_like(moment[-1:])])
