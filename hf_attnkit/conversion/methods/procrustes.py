"""Rotate the heads of a group into one basis, then average (after Jin et al. 2024, arXiv 2412.20677).

Scores do not change if a head's keys and queries are rotated together, nor outputs if its values
are and its output projection is rotated back. Each head takes the rotation that brings it nearest to
the mean of the others, one after another, many times (generalised orthogonal Procrustes). Keys under a rotary embedding
admit only what commutes with it: an angle of its own for each rotated pair of components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.conversion import rotary
from hf_attnkit.conversion.heads import Heads

TRANSFORMS = True
ROUNDS = 20


def key(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries, and the mean of the rotated keys."""
    query, shared = heads.query.clone(), heads.key.new_zeros(heads.key.shape[1:])
    if heads.rope is not None:
        pairs = heads.rope.pairs()
        turned, factors = _aligned_angles(rotary.complex_rows(heads.key, pairs))
        rotary.set_rows(shared, pairs, turned.mean(0))
        rotary.set_rows(query, pairs, rotary.complex_rows(heads.query, pairs) * factors[:, None, :, None])
    plain = rotary.not_rotated(heads)
    if plain:
        turned, rotations = _aligned(heads.key[:, plain])
        shared[plain] = turned.mean(0)
        query[:, :, plain] = torch.einsum("gef,gqfm->gqem", rotations, heads.query[:, :, plain])
    return query, shared


def value(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the rotated values, and output projections that rotate back."""
    turned, rotations = _aligned(heads.value)
    return turned.mean(0), torch.einsum("gqmf,gef->gqme", heads.output, rotations)


def _aligned(heads: Tensor) -> tuple[Tensor, Tensor]:
    """`(c, d, m)` heads turned into one basis, and the rotations `(c, d, d)` that did it."""
    rotations = torch.eye(heads.shape[1], dtype=heads.dtype, device=heads.device).repeat(len(heads), 1, 1)
    for _ in range(ROUNDS):
        for index, head in enumerate(heads):
            turned = rotations @ heads
            u, _, v = torch.linalg.svd((turned.sum(0) - turned[index]) @ head.T)
            rotations[index] = u @ v
    return rotations @ heads, rotations


def _aligned_angles(heads: Tensor) -> tuple[Tensor, Tensor]:
    """The same for complex rows `(c, f, m)`; factors of absolute value one, `(c, f)`."""
    factors = heads.new_ones(heads.shape[:2])
    for _ in range(ROUNDS):
        for index, head in enumerate(heads):
            turned = factors[..., None] * heads
            overlap = ((turned.sum(0) - turned[index]) * head.conj()).sum(-1)
            factors[index] = torch.polar(torch.ones_like(overlap.real), overlap.angle())
    return factors[..., None] * heads, factors
