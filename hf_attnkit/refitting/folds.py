"""Which fold of the calibration each token is in: whole sequences, or, of very few, stretches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.observing.rows import num_rows


class Folds:
    """The folds of some batches, and one more of the sequences that are set aside."""

    def __init__(
        self,
        batches: Sequence[Mapping[str, Any]],
        count: int,
        aside: Sequence[Sequence[int]] | None = None,
        spread: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            count: of folds. The number of the one that is set aside is `count`.
            aside: for each batch, the rows that are in it.
            spread: one of the batches, whose rows go evenly into all folds and do not count among the sequences.
        """
        self.count = count
        rows = [num_rows(batch) for batch in batches]
        out = [set(each) for each in aside] if aside is not None else [set() for _ in batches]
        self._whole = [batch is spread for batch in batches]
        others = zip(rows, out, self._whole, strict=True)
        self.num_sequences = sum(size - len(those) for size, those, whole in others if not whole)
        self._of_row: list[Tensor] = []
        number = 0
        for size, those, whole in zip(rows, out, self._whole, strict=True):
            own = []
            number = 0 if whole else number
            for row in range(size):
                own.append(count if row in those else number % count)
                number += row not in those
            self._of_row.append(torch.tensor(own))

    @property
    def has_aside(self) -> bool:
        return any(bool((own == self.count).any()) for own in self._of_row)

    def is_aside(self, number: int, positions: torch.Size) -> Tensor | None:
        """Which of a batch's activations are set aside, bool `positions`; `None` where nothing is."""
        return self.of(number, positions) == self.count if self.has_aside else None

    def of(self, number: int, positions: torch.Size, *, calls: int = 1) -> Tensor:
        """Fold numbers of a batch's activations, without features `(N, ...)`.

        Args:
            number: of the batch.
            calls: how many calls of a module are one after the other along the first axis.
        """
        size, of_row = positions[0] // calls, self._of_row[number]
        # A sequence may be several rows next to each other (windows of an image, choices).
        own = of_row[torch.arange(size) * len(of_row) // max(size, 1)].repeat(calls)
        own = own.view(-1, *(1,) * (len(positions) - 1)).expand(positions)
        if self._whole[number] or self.num_sequences >= self.count:
            return own
        if len(positions) == 1:
            parts = (torch.arange(size) * self.count // max(size, 1)).repeat(calls)
        else:
            parts = (torch.arange(positions[1]) * self.count // max(positions[1], 1)).expand(positions)
        return torch.where(own == self.count, own, parts)
