"""Which fold of the calibration each token is in: whole sequences, or, of very few, stretches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.observing.rows import num_rows


class Folds:
    """The folds of some batches, one more of the sequences that are set aside, and one of further ones."""

    def __init__(
        self,
        batches: Sequence[Mapping[str, Any]],
        count: int,
        aside: Sequence[Sequence[int]] | None = None,
        further: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            count: of folds. The number of the one that is set aside is `count`.
            aside: for each batch, the rows that are in it.
            further: one of the batches that is in none of these: its number is `count + 1`.
        """
        self.count = count
        rows = [num_rows(batch) for batch in batches]
        out = [set(each) for each in aside] if aside is not None else [set() for _ in batches]
        self._is_further = [batch is further for batch in batches]
        self._of_row: list[Tensor] = []
        self.num_sequences = 0
        for size, those, is_further in zip(rows, out, self._is_further, strict=True):
            own = []
            for row in range(size):
                if is_further:
                    own.append(count + 1)
                elif row in those:
                    own.append(count)
                else:
                    own.append(self.num_sequences % count)
                    self.num_sequences += 1
            self._of_row.append(torch.tensor(own))

    @property
    def has_further(self) -> bool:
        return any(self._is_further)

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
        if self._is_further[number] or self.num_sequences >= self.count:
            return own
        if len(positions) == 1:
            parts = (torch.arange(size) * self.count // max(size, 1)).repeat(calls)
        else:
            parts = (torch.arange(positions[1]) * self.count // max(positions[1], 1)).expand(positions)
        return torch.where(own == self.count, own, parts)
