"""Mean-pooling (Ainslie et al. 2023, arXiv 2305.13245): the baseline of every conversion.

The heads of a layer live in unrelated bases, so their mean is shorter than they are and mixes them:
expect a large loss before training.
"""

from __future__ import annotations

from torch import Tensor

from hf_attnkit.conversion.heads import Heads


def key(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The unchanged queries, and the mean of the keys."""
    return heads.query, heads.key.mean(0)


def value(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the values, and the unchanged output projections."""
    return heads.value.mean(0), heads.output
