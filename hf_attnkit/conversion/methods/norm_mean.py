"""Mean-pooling, rescaled so that the new head is as long as the old ones are on average.

The mean of heads in unrelated bases shrinks by about one over the root of the group's size; this
undoes the shrinking, not the mixing. Lengths are Frobenius norms of weight and bias together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.conversion.heads import Heads


def key(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The unchanged queries, and the rescaled mean of the keys."""
    return heads.query, _pool(heads.key)


def value(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The rescaled mean of the values, and the unchanged output projections."""
    return _pool(heads.value), heads.output


def _pool(heads: Tensor) -> Tensor:
    mean = heads.mean(0)
    norm = torch.linalg.matrix_norm(mean)
    # Heads that cancel have a mean of zero, and no length can be given to that.
    return mean if norm == 0 else mean * (torch.linalg.matrix_norm(heads).mean() / norm)
