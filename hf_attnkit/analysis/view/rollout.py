"""Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): what tokens have of the input tokens, by layer.

With A_l the mean over the heads of layer l, half of what a token becomes is counted as its own (the residual):

    R_0 = I      R_l = normalised(A_l + I) R_{l-1}      rows sum to 1

An attention between two sequences takes from the other one: for a decoder's tokens d and an encoder's e,

    R_d = normalised([I, A_cross]) [R_d; R_e]

so a row of a decoder says what it has of its own inputs and of the encoder's. A learned sink takes part of a row and
gives nothing: rows are normalised without it. Where maps are pooled, so is this: a product of pooled matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attnkit.analysis.view.maps import AttentionMap, Example


@dataclass(frozen=True)
class Rollout:
    """What the tokens of one sequence have of those of another, or of their own.

    Attributes:
        queries, keys: numbers of the sequences.
        steps: names of the attentions, in running order.
        shares: `(steps, rows, columns)` in [0, 1]; the rows of all `keys` of the same `queries` together sum to 1.
    """

    queries: int
    keys: int
    steps: tuple[str, ...]
    shares: Tensor


def step_of(found: AttentionMap) -> tuple[Tensor, Tensor]:
    """What a token keeps of itself, `(rows,)`, and what it takes from each key `(rows, columns)`: they sum to 1."""
    assert found.weights is not None
    mean = found.weights.double().mean(0)
    total = 1 + mean.sum(-1)
    return 1 / total, mean / total[:, None]


def rollout(example: Example) -> tuple[list[Rollout], str]:
    """Rollouts of all sequences whose attentions all have weights, and why there are none of others."""
    shares: dict[int, dict[int, Tensor]] = {}
    found: dict[tuple[int, int], list[Tensor]] = {}
    steps: dict[int, list[str]] = {}
    broken: dict[int, str] = {}
    for each in example.maps:
        for number in (each.queries, each.keys):
            units = example.sequences[number].units
            shares.setdefault(number, {number: torch.eye(units, dtype=torch.float64)})
        if each.missing == "no head is left":  # the residual alone
            continue
        if each.missing:
            broken.setdefault(each.queries, f"{each.name}: {each.missing}")
        if each.keys in broken:
            broken.setdefault(each.queries, broken[each.keys])
        if each.queries in broken:
            continue
        own, taken = step_of(each)
        new = {source: own[:, None] * have for source, have in shares[each.queries].items()}
        for source, have in shares[each.keys].items():
            part = taken @ have
            new[source] = new[source] + part if source in new else part
        shares[each.queries] = new
        steps.setdefault(each.queries, []).append(each.name)
        for source, have in new.items():
            earlier = found.setdefault((each.queries, source), [])
            earlier += [torch.zeros_like(have)] * (len(steps[each.queries]) - 1 - len(earlier))
            earlier.append(have)
    rollouts = [
        Rollout(queries, keys, tuple(steps[queries]), torch.stack(parts))
        for (queries, keys), parts in found.items()
        if queries not in broken
    ]
    return rollouts, "; ".join(dict.fromkeys(broken.values()))
