"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), without repeating keys and values.

query heads      0 1 2 3 | 4 5 6 7        consecutive heads form a group
key/value heads     0    |    1           and share one key and one value head
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_attnkit.attention.kernels import packed
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class GroupedQueryAttention(Kind):
    """Any number of groups, one head per group (multi-head) included."""

    name = "gqa"
    own_window = True

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        scaling: float,
        dropout: float = 0.0,
        call: Call = NO_CALL,
    ) -> tuple[Tensor, None]:
        return packed.attention(query, key, value, mask, scaling=scaling, dropout=dropout)
