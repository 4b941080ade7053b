"""Each kind as a plain attention function of Transformers' own interface, for whole models.

Registered under `plain_<number>` with a full bool mask, and computed by the definition in `reference` under the matrix
that the kind's `seen` gives: what a swapped model must equal when one pass runs over the whole batch.
"""

from __future__ import annotations

from typing import Any

from support.matrix import MATRIX, visible, weighing
from support.reference import attend
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_attnkit.attention.mask import Mask


def full_mask(**arguments: Any) -> Tensor:
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**arguments)


def plain(name: str) -> Any:
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
        is_causal = not mask.triu(1).any()
        given = Mask.receive(mask, query.shape[2], key.shape[2], is_causal=is_causal, device=mask.device)
        seen = visible(name, given, query.shape[1], key.shape[1])
        weighed = weighing(name, given, seen, query.shape[1], key.shape[1])
        output = attend(query, key, value, seen, scaling=scaling, bias=position_bias, **weighed)
        return output.transpose(1, 2).contiguous(), None

    return forward


def register(name: str) -> str:
    """Make the kind's definition an `attn_implementation`; returns its name."""
    stock = f"plain_{list(MATRIX).index(name)}"  # Transformers looks for a kernel where a name says flash
    AttentionInterface.register(stock, plain(name))
    AttentionMaskInterface.register(stock, full_mask)
    return stock
