"""The methods by name, and one merge with them: old heads and groups in, new heads and losses out.

A method is a file with two functions over one group of heads (shapes in `heads`, S the second moment):

    key(heads, S)   -> new queries (c, q, d, m + 1), shared key (d, m + 1)
    value(heads, S) -> shared value (d, m + 1), new output projections (c, q, M, d)

and two flags: `TRANSFORMS_KEYS` if keys get another basis, `USES_STATISTICS` if S matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import first, loss, mean, norm_mean, pca, procrustes, random
from .heads import Heads
from .moments import mean as mean_input

METHODS: dict[str, ModuleType] = {
    "mean": mean,
    "norm_mean": norm_mean,
    "first": first,
    "random": random,
    "procrustes": procrustes,
    "pca": pca,
}


def transforms_keys(method: str) -> bool:
    """Whether the method gives keys another basis, so that queries change with them."""
    return getattr(METHODS[method], "TRANSFORMS_KEYS", False)


def uses_statistics(method: str) -> bool:
    """Whether the method looks at the inputs' second moment."""
    return getattr(METHODS[method], "USES_STATISTICS", False)


@dataclass(frozen=True)
class Merged:
    """What a merge gives.

    Attributes:
        heads: the new ones.
        constant: `(M,)` to add to the output bias, or `None`.
        key_loss, value_loss: see `loss`; 0 is exact, lower is better.
    """

    heads: Heads
    constant: Tensor | None
    key_loss: float
    value_loss: float


class KeyHalf(NamedTuple):
    """One group's new queries `(c, q, d, m + 1)` and key `(d, m + 1)`; lost and total energy, see `loss`."""

    query: Tensor
    key: Tensor
    lost: float
    total: float


class ValueHalf(NamedTuple):
    """One group's new value `(d, m + 1)` and output projections `(c, q, M, d)`; lost and total energy, see `loss`.

    `constant` `(M,)` is to be added to the output bias, or `None`.
    """

    value: Tensor
    output: Tensor
    constant: Tensor | None
    lost: float
    total: float


def merge(heads: Heads, groups: Sequence[Sequence[int]], second_moment: Tensor, method: str, key_method: str) -> Merged:
    """One new head for each group of old ones."""
    second_moment = second_moment.to(heads.key)
    keys, values = [], []
    for members in groups:
        group = heads.group(members)
        keys.append(merge_keys(group, second_moment, key_method))
        values.append(merge_values(group, second_moment, method))
    merged = replace(
        heads,
        query=torch.stack([half.query.flatten(0, 1) for half in keys]),
        key=torch.stack([half.key for half in keys]),
        value=torch.stack([half.value for half in values]),
        output=torch.stack([half.output.flatten(0, 1) for half in values]),
    )
    return Merged(merged, constant(values), lost_share(keys), lost_share(values))


def merge_keys(heads: Heads, second_moment: Tensor, method: str) -> KeyHalf:
    """One new key for these; reads `query` and `key` alone."""
    query, key = METHODS[method].key(heads, second_moment)
    return KeyHalf(query, key, *loss.key_energy(heads, query, key, second_moment))


def merge_values(heads: Heads, second_moment: Tensor, method: str) -> ValueHalf:
    """One new value for these; reads `value` and `output` alone."""
    value, output = METHODS[method].value(heads, second_moment)
    moved = None
    if uses_statistics(method) and heads.output_bias:
        # These values were chosen up to a constant, which the softmax passes on as it is.
        inputs = mean_input(second_moment)
        moved = torch.einsum("gqme,ge->m", heads.output, heads.value @ inputs)
        moved -= torch.einsum("gqme,e->m", output, value @ inputs)
    return ValueHalf(value, output, moved, *loss.value_energy(heads, value, output, second_moment))


def constant(halves: Sequence[ValueHalf]) -> Tensor | None:
    """What all groups of a layer add to its output bias."""
    parts = [half.constant for half in halves if half.constant is not None]
    return torch.stack(parts).sum(0) if parts else None


def lost_share(halves: Sequence[KeyHalf] | Sequence[ValueHalf]) -> float:
    """The share of a layer's energy that its groups lose."""
    lost, total = sum(half.lost for half in halves), sum(half.total for half in halves)
    return max(lost, 0.0) / total if total > 0 else 0.0


def group_loss(heads: Heads, members: Sequence[int], second_moment: Tensor, method: str, key_method: str) -> float:
    """The energy that merging these heads loses, as shares of the layer's: comparable between groups of a layer."""
    second_moment, group = second_moment.to(heads.key), heads.group(members)
    return merge_keys(group, second_moment, key_method).lost + merge_values(group, second_moment, method).lost
