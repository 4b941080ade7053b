"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), without repeating keys and values.

query heads      0 1 2 3 | 4 5 6 7        consecutive heads form a group
key/value heads     0    |    1           and share one key and one value head
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.eight_bits import check_cache_dtype
from hf_attnkit.attention.growing_cache import full_layer
from hf_attnkit.attention.kernels import packed
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class GroupedQueryAttention(Kind):
    """Any number of groups, one head per group (multi-head) included.

    Attributes:
        cache_dtype: of the cache's keys and values, "int8" or "float8_e4m3fn"; `None` for the model's own.
    """

    name = "gqa"
    own_window = True

    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        check_cache_dtype(self.cache_dtype)

    def create_cache(self, max_length: int | None) -> SequenceLayer | None:
        """All tokens, in 8 bits; in the model's own dtype they are kept by Transformers' layer."""
        return None if self.cache_dtype is None else full_layer(max_length, self.cache_dtype)

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
