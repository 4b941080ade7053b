"""Which fold of the calibration each token is in: whole sequences, or, of very few, stretches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.observing.rows import num_rows


class Folds:
    """The folds of some batches."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], count: int) -> None:
        """
        Args:
            count: of folds.
        """
        self.count = count
        self._rows = [num_rows(batch) for batch in batches]
        self.num_sequences = sum(self._rows)

    def of(self, number: int, positions: torch.Size, *, calls: int = 1) -> Tensor:
        """Fold numbers of a batch's activations, without features `(N, ...)`.

        Args:
            number: of the batch.
            calls: how many calls of a module are one after the other along the first axis.
        """
        size = positions[0] // calls
        if self.num_sequences >= self.count:
            # A sequence may be several rows next to each other (windows of an image, choices).
            own = torch.arange(size) * self._rows[number] // max(size, 1) + sum(self._rows[:number])
            folds = (own % self.count).repeat(calls)
            return folds.view(-1, *(1,) * (len(positions) - 1)).expand(positions)
        if len(positions) == 1:
            return (torch.arange(size) * self.count // max(size, 1)).repeat(calls)
        return (torch.arange(positions[1]) * self.count // max(positions[1], 1)).expand(positions)
