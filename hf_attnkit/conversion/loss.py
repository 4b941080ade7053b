"""What a merge loses, predicted from weights and statistics: one measure for all methods.

    keys     sum over query heads of E (s - s')^2, s and s' the scores of an old and the new key;
             query and key drawn independently, rotated pairs averaged over all angles
    values   sum over query heads of E |W_o v - W_o' v'|^2

each divided by the same sum without the primed part. 0 is exact; 1 is what dropping the heads would
lose; above 1 the new head does harm. For `pca` it is the share of the spectrum that is discarded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rotary
from .heads import Heads
from .pca import covariance


def key_energy(heads: Heads, query: Tensor, key: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Lost and total energy of a group's scores.

    Args:
        heads: the group as it was.
        query, key: the new ones, `(c, q, d, m + 1)` and `(d, m + 1)`.
    """
    lost = total = second_moment.new_zeros(())
    old, new = heads.key, key.expand_as(heads.key)
    if heads.rope is not None:
        pairs = heads.rope.pairs()
        # A score's part at one pair has one complex component.
        q, new_q, k, new_k = (rotary.complex_rows(rows, pairs)[..., None, :] for rows in (heads.query, query, old, new))
        moment = second_moment.to(q.dtype)
        lost, total = _energy(q, new_q, k, new_k, moment, moment)
        lost, total = lost / 2, total / 2  # the mean of cos^2
    plain = rotary.not_rotated(heads)
    if plain:
        q, new_q, k, new_k = (rows[..., plain, :].unsqueeze(-3) for rows in (heads.query, query, old, new))
        more = _energy(q, new_q, k, new_k, second_moment, covariance(second_moment))
        lost, total = lost + more[0], total + more[1]
    return lost, total


def value_energy(heads: Heads, value: Tensor, output: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Lost and total energy of a group's contributions to the output; `value` `(d, m + 1)`, `output` `(c, q, M, d)`."""
    moment = covariance(second_moment) if heads.output_bias else second_moment
    stacked = torch.cat([heads.value, -value.expand_as(heads.value)], dim=1)
    gram = stacked @ moment @ stacked.mT
    both = torch.cat([heads.output, output], dim=-1)
    metric = torch.einsum("gqme,gqmf->gef", both, both)
    size = value.shape[0]
    return (metric * gram).sum(), (metric * gram)[:, :size, :size].sum()


def _energy(
    query: Tensor, new_query: Tensor, key: Tensor, new_key: Tensor, query_moment: Tensor, key_moment: Tensor
) -> tuple[Tensor, Tensor]:
    """E |conj(q) k - conj(q') k'|^2 and E |conj(q) k|^2, summed over all but the last two axes, the components of one
    score: queries `(c, q, ..., d, m)`, keys `(c, ..., d, m)`."""
    size = key.shape[-2]
    queries = torch.cat([query, new_query], dim=-2)
    keys = torch.cat([key, -new_key], dim=-2)
    of_query = (queries @ query_moment @ queries.mH).sum(1)
    product = (of_query.conj() * (keys @ key_moment @ keys.mH)).real
    return product.sum(), product[..., :size, :size].sum()
