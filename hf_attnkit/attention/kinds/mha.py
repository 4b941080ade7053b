"""Multi-head attention (Vaswani et al. 2017): the readable reference, and the kind that returns weights.

    softmax(scaling * Q K^T) V        one key/value head per query head

On a model with grouped heads every key/value head is repeated for the queries of its group, so that
the formula stays that of the paper; `gqa` computes the same without the copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class MultiHeadAttention(Kind):
    """The weights it returns are those after dropout, as in Transformers' eager attention."""

    name = "mha"
    own_window = True
    returns_weights = True

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
    ) -> tuple[Tensor, Tensor]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        # Scaled before the product, so that in 16 bits no score overflows that would not once scaled.
        weights = mask.softmax((query * scaling) @ key.transpose(-1, -2))
        weights = F.dropout(weights, dropout)
        return weights @ value, weights
