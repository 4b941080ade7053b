"""Keep the first key/value head of each group and drop the others: the crudest baseline."""

from __future__ import annotations

from torch import Tensor

from hf_attnkit.conversion.heads import Heads


def key(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The unchanged queries, and the first key head."""
    return heads.query, heads.key[0]


def value(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The first value head, and the unchanged output projections."""
    return heads.value[0], heads.output
