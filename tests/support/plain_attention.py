"""Each implementation as a plain attention function of Transformers' own interface, for whole models.

Registered under `plain_<number>` with a full bool mask, made from the definition in `reference`: what
a swapped model must equal when one pass runs over the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from support.matrix import MATRIX, by_score
from support.reference import Text, attend
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def full_mask(**arguments: Any) -> Tensor:
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**arguments)


def plain(name: str, pattern: Any) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scaling: float,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        # Cross-attention keeps the model's own: positions of two sequences make no pattern.
        if getattr(module, "is_decoder", False) and not module.is_causal:
            output = attend(query, key, value, mask, scaling=scaling, bias=position_bias)
            return output.transpose(1, 2).contiguous(), None
        i, j = torch.arange(query.shape[2])[None, :, None], torch.arange(key.shape[2])[None, None]
        real = mask.any(-2)[:, 0].int()
        first = real.argmax(-1)[:, None, None]
        last = real.shape[1] - 1 - real.flip(-1).argmax(-1)[:, None, None]
        is_causal = not mask.triu(1).any()
        where = Text(i, j, first, last, is_causal)
        output = attend(query, key, value, mask & pattern(where)[:, None], scaling=scaling, bias=position_bias,
                        softmax=by_score(name, where), features=MATRIX[name].features)  # fmt: skip
        return output.transpose(1, 2).contiguous(), None

    return forward


def register(name: str) -> str:
    """Make the implementation's definition an `attn_implementation`; returns its name."""
    stock = f"plain_{list(MATRIX).index(name)}"  # Transformers looks for a kernel where a name says flash
    AttentionInterface.register(stock, plain(name, MATRIX[name].pattern))
    AttentionMaskInterface.register(stock, full_mask)
    return stock
