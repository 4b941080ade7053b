"""Mean-pooling (Ainslie et al. 2023, arXiv 2305.13245): the baseline of every conversion.

The heads of a layer live in unrelated bases, so their mean is shorter than they are and mixes them:
expect a large loss before training.
"""

from __future__ import annotations

from torch import Tensor


def pool(heads: Tensor) -> Tensor:
    """`(groups, heads per group, head_dim, ...)` to `(groups, head_dim, ...)`: the mean of each group."""
    return heads.mean(1)
