"""Which key/value heads share a group: adjacent ones, or those that lose least together.

Heads may be grouped at will, since permuting key, value, query and output projections together
changes nothing. The loss of a grouping is the sum over its groups. All groupings are tried where that
takes few losses and few sets of heads (12 heads: always); beyond, pairs of heads are swapped as long as
that helps, from the adjacent grouping and from random ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

GROUPINGS = ("adjacent", "best")
MOST_SUBSETS = 1000
# What dynamic programming goes through is sets of heads: 2^15 here, and 2^31 for 32 heads in pairs.
MOST_HEADS = 16
RESTARTS = 3

Group = tuple[int, ...]
Grouping = list[Group]


def adjacent(num_heads: int, num_groups: int) -> Grouping:
    """Consecutive heads, as `repeat_kv` groups them."""
    size = num_heads // num_groups
    return [tuple(range(start, start + size)) for start in range(0, num_heads, size)]


def best(num_heads: int, num_groups: int, loss: Callable[[Group], float]) -> Grouping:
    """The grouping of equal groups with the least sum of losses; exact for few heads."""
    if num_groups in (1, num_heads):
        return adjacent(num_heads, num_groups)
    known: dict[Group, float] = {}

    def cached(group: Group) -> float:
        if group not in known:
            known[group] = loss(group)
        return known[group]

    size = num_heads // num_groups
    if num_heads <= MOST_HEADS and math.comb(num_heads, size) <= MOST_SUBSETS:
        return _exact(tuple(range(num_heads)), size, cached, {})[1]
    generator = torch.Generator().manual_seed(0)
    starts = [list(range(num_heads))]
    starts += [torch.randperm(num_heads, generator=generator).tolist() for _ in range(RESTARTS)]
    found = [_descend([tuple(sorted(s[i : i + size])) for i in range(0, num_heads, size)], cached) for s in starts]
    return sorted(min(found, key=lambda grouping: sum(map(cached, grouping))))


def _exact(
    left: Group, size: int, loss: Callable[[Group], float], known: dict[Group, tuple[float, Grouping]]
) -> tuple[float, Grouping]:
    """The best grouping of the heads that are left, by dynamic programming: the first of them is in some group."""
    if not left:
        return 0.0, []
    if left not in known:
        options = []
        for others in itertools.combinations(left[1:], size - 1):
            group = (left[0], *others)
            rest, grouping = _exact(tuple(h for h in left if h not in group), size, loss, known)
            options.append((loss(group) + rest, [group, *grouping]))
        known[left] = min(options, key=lambda option: option[0])
    return known[left]


def _descend(grouping: Grouping, loss: Callable[[Group], float]) -> Grouping:
    """Swap heads of two groups while some swap helps."""
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(grouping)), 2):
            for x, y in itertools.product(grouping[a], grouping[b]):
                if x not in grouping[a] or y not in grouping[b]:
                    continue
                one = tuple(sorted({*grouping[a], y} - {x}))
                two = tuple(sorted({*grouping[b], x} - {y}))
                if loss(one) + loss(two) < loss(grouping[a]) + loss(grouping[b]) - 1e-12:
                    grouping[a], grouping[b] = one, two
                    improved = True
    return grouping
