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


def merge(heads: Heads, groups: Sequence[Sequence[int]], second_moment: Tensor, method: str, key_method: str) -> Merged:
    """One new head for each group of old ones."""
    second_moment = second_moment.to(heads.key)
    parts = [_merge_group(heads.group(members), second_moment, method, key_method) for members in groups]
    energies = torch.tensor([part.energies for part in parts], dtype=torch.float64).sum(0).tolist()
    merged = replace(
        heads,
        query=torch.stack([part.query.flatten(0, 1) for part in parts]),
        key=torch.stack([part.key for part in parts]),
        value=torch.stack([part.value for part in parts]),
        output=torch.stack([part.output.flatten(0, 1) for part in parts]),
    )
    constant = None
    if uses_statistics(method) and heads.output_bias:
        # These values were chosen up to a constant, which the softmax passes on as it is.
        inputs = second_moment[:, -1]
        constant = _constant(heads, inputs) - _constant(merged, inputs)
    return Merged(merged, constant, _share(*energies[:2]), _share(*energies[2:]))


def group_loss(heads: Heads, members: Sequence[int], second_moment: Tensor, method: str, key_method: str) -> float:
    """The energy that merging these heads loses, as shares of the layer's: comparable between groups of a layer."""
    second_moment = second_moment.to(heads.key)
    energies = _merge_group(heads.group(members), second_moment, method, key_method).energies
    return energies[0] + energies[2]


class _Part(NamedTuple):
    """One group's new heads, and the lost and total energies of keys and of values."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    energies: list[float]


def _merge_group(heads: Heads, second_moment: Tensor, method: str, key_method: str) -> _Part:
    query, key = METHODS[key_method].key(heads, second_moment)
    value, output = METHODS[method].value(heads, second_moment)
    energies = [
        *loss.key_energy(heads, query, key, second_moment),
        *loss.value_energy(heads, value, output, second_moment),
    ]
    return _Part(query, key, value, output, [float(energy) for energy in energies])


def _constant(heads: Heads, inputs: Tensor) -> Tensor:
    return torch.einsum("gqme,ge->m", heads.output, heads.value @ inputs)


def _share(lost: float, total: float) -> float:
    return max(lost, 0.0) / total if total > 0 else 0.0
