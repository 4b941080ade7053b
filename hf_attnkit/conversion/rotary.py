"""Rows of a projection as complex numbers, one for each pair that a rotary embedding turns (Su et al. 2021).

Rotating a pair (a, b) by an angle multiplies z = a + ib by e^(i angle), whichever way a family pairs
its components. A score is the real part of the sum over pairs of conj(q) z, so a factor c on the
keys' rows is undone by 1 / conj(c) on the queries', at every distance: complex factors are all that
commutes with the rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.conversion.heads import Heads

Pairs = tuple[list[int], list[int]]


def complex_rows(heads: Tensor, pairs: Pairs) -> Tensor:
    """`(..., head_dim, m)` to complex `(..., pairs, m)`."""
    return torch.complex(heads[..., pairs[0], :], heads[..., pairs[1], :])


def set_rows(heads: Tensor, pairs: Pairs, rows: Tensor) -> None:
    """Write complex rows back, in place."""
    heads[..., pairs[0], :], heads[..., pairs[1], :] = rows.real, rows.imag


def not_rotated(heads: Heads) -> list[int]:
    """The components of a head that are not rotated."""
    return list(range(heads.rope.size if heads.rope is not None else 0, heads.key.shape[-2]))
