"""The sequences of batches: told apart, and some of them set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def num_rows(batch: Batch) -> int:
    """How many sequences a batch holds along the first axis of its tensors; 1 where they cannot be told apart."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    nested = any(not isinstance(value, (Tensor, str, bool, int, float, type(None))) for value in batch.values())
    sizes = {len(value) for value in tensors.values()}
    # Positions in three axes (text, height, width) have these first.
    stacked = any(name == "position_ids" and value.dim() > 2 for name, value in tensors.items())
    # Next to one text there may be many patches of its images.
    texts = [len(tensors[name]) for name in ("input_ids", "inputs_embeds") if name in tensors]
    count = texts[0] if texts else max(sizes, default=1)
    return 1 if nested or stacked or not sizes <= {1, count} else count


def rows_of(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """The batch with these of its sequences."""
    count, index = num_rows(batch), torch.tensor(rows)
    if list(rows) == list(range(count)):
        return dict(batch)

    def part(value: Any) -> Any:
        is_each = isinstance(value, Tensor) and value.dim() and len(value) == count
        return value[index.to(value.device)] if is_each else value

    return {name: part(value) for name, value in batch.items()}


def set_aside(batches: Sequence[Batch], share: float) -> list[list[int]]:
    """For each batch which of its sequences to set aside: about `share` of all, evenly spread, at least one.

    A batch whose sequences cannot be told apart counts as one. Of a single sequence, or where `share` is 0, none are
    set aside. A row that is all padding is never set aside, and some row that is not always stays.
    """
    places = [(number, row) for number, batch in enumerate(batches) for row in range(num_rows(batch))]
    count = max(round(share * len(places)), 1) if share and len(places) > 1 else 0
    chosen = {places[int((each + 0.5) * len(places) / count)] for each in range(count)}
    aside = [
        [row for row in range(num_rows(batch)) if (number, row) in chosen and _is_real(batch, row)]
        for number, batch in enumerate(batches)
    ]
    stays = any(
        _is_real(batch, row)
        for batch, rows in zip(batches, aside, strict=True)
        for row in range(num_rows(batch))
        if row not in rows
    )
    return aside if stays else [[] for _ in batches]


def _is_real(batch: Batch, row: int) -> bool:
    mask = batch.get("attention_mask")
    return not isinstance(mask, Tensor) or mask.dim() != 2 or row >= len(mask) or bool(mask[row].any())
