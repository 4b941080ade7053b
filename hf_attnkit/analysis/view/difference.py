"""How much the attention of matched heads differs: total variation, query by query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attnkit.analysis.view.maps import AttentionMap, Example
from hf_attnkit.analysis.view.matching import Matched, agreement, match
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Difference:
    """One attention before and after.

    Attributes:
        matched: for each head before, its number after, or `None` where it is gone.
        by_query: `(heads before, rows)` in [0, 1]: half the sum over keys of |p - p'|, a mean over a row's queries;
            of pooled maps that of the pooled rows, which is at most that of the queries. NaN for a head that is gone.
        total: `(heads before,)`, the mean over queries.
    """

    matched: Matched
    by_query: Tensor
    total: Tensor


def differences(
    before: tuple[list[AttentionLayer], Example], after: tuple[list[AttentionLayer], Example]
) -> list[Difference]:
    """One for each attention of an example; in those without weights on one side, nothing is matched.

    Raises:
        ValueError: if the models do not see the same tokens.
    """
    (layers, example), (new_layers, new_example) = before, after
    if [len(s.labels) for s in example.sequences] != [len(s.labels) for s in new_example.sequences] or len(
        example.maps
    ) != len(new_example.maps):
        raise ValueError("compare does not attend to the same tokens as model on these inputs, so nothing is compared")
    known: dict[int, Tensor | None] = {}
    found = []
    for one, other in zip(example.maps, new_example.maps, strict=True):
        if one.layer not in known:
            own = [next(each for each in part if each.index == one.layer) for part in (layers, new_layers)]
            known[one.layer] = agreement(*own)
        found.append(_difference(one, other, known[one.layer], example))
    return found


def _difference(one: AttentionMap, other: AttentionMap, agree: Tensor | None, example: Example) -> Difference:
    if one.weights is None or other.weights is None:
        nothing = torch.full((one.num_heads, example.sequences[one.queries].units), torch.nan)
        return Difference((None,) * one.num_heads, nothing, nothing.mean(-1))
    p, q = _same_columns(one, other)
    sizes = _queries_in_rows(example, one.queries)
    apart = torch.stack([total_variation(head, q) @ sizes for head in p])  # (before, after)
    matched = match(agree, apart, len(p), len(q))
    by_query = torch.full(p.shape[:2], torch.nan)
    for head, new in enumerate(matched):
        if new is not None:
            by_query[head] = total_variation(p[head], q[new]).float()
    return Difference(matched, by_query, by_query @ sizes.float())


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half of the sum of |p - q| over the last axis, in [0, 1]."""
    return (p - q).abs().sum(-1) / 2


def _same_columns(one: AttentionMap, other: AttentionMap) -> tuple[Tensor, Tensor]:
    """Distributions of both in float64, a sink's column in both where one has it."""
    p, q = one.distributions.double(), other.distributions.double()
    wide = max(p.shape[-1], q.shape[-1])
    return torch.nn.functional.pad(p, (0, wide - p.shape[-1])), torch.nn.functional.pad(q, (0, wide - q.shape[-1]))


def _queries_in_rows(example: Example, number: int) -> Tensor:
    """The share of the queries that each row of a map is of."""
    sequence = example.sequences[number]
    sizes = torch.full((sequence.units,), float(sequence.block), dtype=torch.float64)
    sizes[-1] = len(sequence.labels) - sequence.block * (sequence.units - 1)
    return sizes / sizes.sum()
