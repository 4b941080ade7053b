"""The methods by name, and one merge with them: old heads and groups in, new heads and losses out.

A method is a file with two functions over one group of heads (shapes in `heads`, S the second moment):

    key(heads, S)   -> new queries (c, q, d, m + 1), shared key (d, m + 1)
    value(heads, S) -> shared value (d, m + 1), new output projections (c, q, M, d)

and flags: `TRANSFORMS` if keys and values get another basis, so that queries and output projections
change with them (without it a method returns those that it was given); `USES_STATISTICS` if S matters.
A method that knows what a group loses without merging it may say so, for the search of groups: `key_lost(heads, S)` and
`value_lost(heads, S)` give functions of the heads' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attnkit.conversion import predicted_loss as loss
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.methods import first, mean, norm_mean, pca, procrustes, random
from hf_attnkit.conversion.moments import mean as mean_input

METHODS: dict[str, ModuleType] = {
    "mean": mean,
    "norm_mean": norm_mean,
    "first": first,
    "random": random,
    "procrustes": procrustes,
    "pca": pca,
}


def transforms(method: str) -> bool:
    """Whether queries change with the keys that the method merges, and output projections with the values."""
    return getattr(METHODS[method], "TRANSFORMS", False)


def uses_statistics(method: str) -> bool:
    """Whether the method looks at the inputs' second moment."""
    return getattr(METHODS[method], "USES_STATISTICS", False)


@dataclass(frozen=True)
class Merged:
    """What a merge gives.

    Attributes:
        heads: the new ones.
        constant: `(M,)` to add to the output bias, or `None`.
        key_loss, value_loss: see `predicted_loss`; 0 is exact, lower is better.
    """

    heads: Heads
    constant: Tensor | None
    key_loss: float
    value_loss: float


def merge_keys(heads: Heads, second_moment: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """One new key for a group: queries `(c, q, d, m + 1)` and key `(d, m + 1)`.

    Reads keys, and queries if the method transforms.
    """
    found: tuple[Tensor, Tensor] = METHODS[method].key(heads, second_moment)
    return found


def merge_values(heads: Heads, second_moment: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """One new value for a group: value `(d, m + 1)`, output projections `(c, q, M, d)`, and a constant `(M,)` to add
    to the output bias, or `None`.

    Reads values, and output projections if the method transforms.
    """
    value, output = METHODS[method].value(heads, second_moment)
    moved = None
    if uses_statistics(method) and heads.output_bias:
        # These values were chosen up to a constant, which the softmax passes on as it is.
        inputs = mean_input(second_moment)
        moved = torch.einsum("gqme,ge->m", heads.output, heads.value @ inputs)
        moved -= torch.einsum("gqme,e->m", output, value @ inputs)
    return value, output, moved


def total_constant(constants: Sequence[Tensor | None]) -> Tensor | None:
    """What all groups of a layer add to its output bias."""
    parts = [constant for constant in constants if constant is not None]
    return torch.stack(parts).sum(0) if parts else None


def merge(heads: Heads, groups: Sequence[Sequence[int]], second_moment: Tensor, method: str, key_method: str) -> Merged:
    """One new head for each group of old ones, and what that loses.

    A loss that needs queries (outputs) which are absent is NaN.
    """
    second_moment, heads = _on_device(heads, second_moment)
    in_order = [head for members in groups for head in members] == list(range(len(heads.key)))
    parts = [_merge_group(heads, members, second_moment, method, key_method, in_order=in_order) for members in groups]
    merged = replace(
        heads,
        query=_stacked([part.query for part in parts], heads.query),
        key=torch.stack([part.key for part in parts]),
        value=torch.stack([part.value for part in parts]),
        output=_stacked([part.output for part in parts], heads.output),
    )
    losses = _lost_share([part.key_energy for part in parts]), _lost_share([part.value_energy for part in parts])
    return Merged(merged, total_constant([part.constant for part in parts]), *losses)


def group_loss(heads: Heads, second_moment: Tensor, method: str, key_method: str) -> Callable[[Sequence[int]], float]:
    """What merging some of these heads loses, as a function of their numbers.

    The share of the layer's energy of scores and that of outputs, added: energies themselves have different units.
    """
    second_moment, heads = _on_device(heads, second_moment)
    of_values = second_moment if heads.value_moment is None else heads.value_moment
    by_keys, by_values = METHODS[key_method], METHODS[method]
    each = [_merge_group(heads, [head], second_moment, "first", "first") for head in range(len(heads.key))]
    keys, values = (max(sum(energies), 1e-300) for energies in zip(*(part.energies for part in each), strict=True))

    def lost(members: Sequence[int]) -> tuple[float, float]:
        part = _merge_group(heads, members, second_moment, method, key_method)
        return part.key_energy[0], part.value_energy[0]

    if not (hasattr(by_keys, "key_lost") and hasattr(by_values, "value_lost")):
        return lambda members: sum(x / y for x, y in zip(lost(members), (keys, values), strict=True))
    key_lost, value_lost = by_keys.key_lost(heads, second_moment), by_values.value_lost(heads, of_values)
    return lambda members: float(key_lost(members) / keys + value_lost(members) / values)


class _Part(NamedTuple):
    """One group's new heads, and lost and total energy, see `predicted_loss`."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    constant: Tensor | None
    key_energy: tuple[float, float]
    value_energy: tuple[float, float]

    @property
    def energies(self) -> tuple[float, float]:
        return self.key_energy[1], self.value_energy[1]


def _merge_group(
    heads: Heads,
    members: Sequence[int],
    second_moment: Tensor,
    method: str,
    key_method: str,
    *,
    in_order: bool = False,
) -> _Part:
    """Keys with their queries first, then values with their outputs: copies are of one half at a time.

    Args:
        in_order: whether what a method leaves as it is may be absent, since it also keeps its place.
    """
    of_values = second_moment if heads.value_moment is None else heads.value_moment
    unknown = float("nan"), float("nan")
    group = replace(heads, output=ABSENT).group(members)
    query, key = merge_keys(group, second_moment, key_method)
    key_energy = loss.key_energy(group, query, key, second_moment) if query.numel() else unknown
    query = ABSENT if in_order and not transforms(key_method) else query
    group = replace(heads, query=ABSENT).group(members)
    value, output, constant = merge_values(group, of_values, method)
    value_energy = loss.value_energy(group, value, output, of_values) if output.numel() else unknown
    output = ABSENT if in_order and not transforms(method) else output
    return _Part(query, key, value, output, constant, key_energy, value_energy)


def _on_device(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Heads]:
    moved = {
        name: moment.to(heads.key)
        for name in ("query_moment", "value_moment")
        if (moment := getattr(heads, name)) is not None
    }
    return second_moment.to(heads.key), replace(heads, **moved)


def _stacked(parts: Sequence[Tensor], present: Tensor) -> Tensor:
    """Those of all groups; the present ones where the parts are absent."""
    if parts[0].numel():
        return torch.stack([part.flatten(0, 1) for part in parts])
    return present.flatten(0, 1).unflatten(0, (len(parts), -1)) if present.numel() else ABSENT


def _lost_share(energies: Sequence[tuple[float, float]]) -> float:
    lost, total = sum(energy[0] for energy in energies), sum(energy[1] for energy in energies)
    if isnan(total):
        return total
    return max(lost, 0.0) / total if total > 0 else 0.0
