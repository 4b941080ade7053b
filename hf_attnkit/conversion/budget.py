"""Spend a number of key/value heads over the layers where fewer would cost most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def spend(losses: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """The number of heads for each layer, `total` at most in all, with the least sum of losses; exact.

    Args:
        losses: per layer, possible numbers of heads and what each loses.

    Raises:
        ValueError: if even the fewest heads are more than `total`.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in losses:
        after: dict[int, tuple[float, list[int]]] = {}
        for used, (lost, chosen) in best.items():
            for number, loss in layer.items():
                option = (lost + loss, [*chosen, number])
                if used + number <= total and (used + number not in after or option < after[used + number]):
                    after[used + number] = option
        best = after
    if not best:
        fewest = sum(min(layer) for layer in losses)
        raise ValueError(f"{total} key/value heads are too few for {len(losses)} layers, which need {fewest} at least")
    return min(best.values())[1]
