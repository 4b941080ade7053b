"""Multi-query attention (Shazeer 2019, arXiv 1911.02150): all query heads share one key and one value head.

With a single key/value head its axis disappears: all heads of all queries form one matrix,
"b h q d -> b (h q) d".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class MultiQueryAttention(Kind):
    """For layers with exactly one key/value head."""

    name = "mqa"
    own_window = True

    def check_heads(self, num_heads: int, num_key_value_heads: int) -> None:
        """Raise `ValueError` unless the layer has exactly one key/value head."""
        if num_key_value_heads != 1:
            raise ValueError(
                f"'mqa' needs 1 key/value head but the layer has {num_key_value_heads}; "
                "call convert_to_mqa(model) first, or use 'gqa'"
            )

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
        self.check_heads(query.shape[1], key.shape[1])
        batch, num_heads, q_length, head_dim = query.shape
        key, value = key[:, 0], value[:, 0]
        scores = (query * scaling).reshape(batch, -1, head_dim) @ key.transpose(-1, -2)
        weights = mask.softmax(scores.view(batch, num_heads, q_length, -1))
        weights = F.dropout(weights, dropout)
        output = weights.view(batch, num_heads * q_length, -1) @ value
        return output.view(batch, num_heads, q_length, -1), None
