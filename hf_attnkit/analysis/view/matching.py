"""Which head of a changed model was which head before, through pruning, grouping, swaps and training.

A head keeps what it writes to: the columns W_h of the output projection that belong to it. Two heads are the same
where these agree, in whatever basis a conversion wrote the head's values:

    agreement = |W_h^T W'_g|_F^2 / (|W_h^T W_h|_F |W'_g^T W'_g|_F)     in [0, 1]; about head_dim / width by chance

Heads of which no other has `ALIKE` are matched by number where as many are left, else by what they attend to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attnkit.models.attention import is_linear
from hf_attnkit.models.layers import AttentionLayer, weight_of

ALIKE = 0.5

Matched = tuple[int | None, ...]  # for each head before its number after; `None` where it is gone


def same_layers(before: Sequence[AttentionLayer], after: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` unless two models have the same attentions."""
    if len(before) != len(after) or any(
        one.is_cross != other.is_cross for one, other in zip(before, after, strict=True)
    ):
        raise ValueError(
            f"compare has {len(after)} attentions and model has {len(before)}: heads can be matched in models of the "
            "same layers only"
        )


def agreement(before: AttentionLayer, after: AttentionLayer) -> Tensor | None:
    """`(heads before, heads after)` in [0, 1], or `None` where it cannot be told."""
    parts = []
    for layer in (before, after):
        if layer.output is None or not is_linear(layer.output):
            return None
        weight = weight_of(layer.output).float().cpu()
        if weight.shape[1] != layer.num_heads * layer.value_head_dim:
            return None
        parts.append(weight.unflatten(1, (layer.num_heads, -1)).permute(1, 0, 2)[: len(layer.heads)])
    one, other = parts
    if one.shape[1] != other.shape[1]:
        return None

    def size(heads: Tensor) -> Tensor:
        products = heads.mT @ heads
        return products.square().sum((-1, -2)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    between = torch.einsum("hfa,gfb->hgab", one, other).square().sum((-1, -2))
    return between / (size(one)[:, None] * size(other))


def match(agree: Tensor | None, apart: Tensor | None, before: int, after: int) -> Matched:
    """Match the heads of one layer.

    Args:
        agree: `(before, after)`, as `agreement`.
        apart: `(before, after)`: how much two heads' attention differs, or `None`.
        before, after: numbers of heads.
    """
    found: dict[int, int] = {}
    if agree is not None:
        _pair(-agree, found, limit=-ALIKE)
    left = [head for head in range(before) if head not in found]
    free = [head for head in range(after) if head not in found.values()]
    if len(left) == len(free):
        found |= dict(zip(left, free, strict=True))
    elif apart is not None:
        _pair(apart, found)
    return tuple(found.get(head) for head in range(before))


def _pair(cost: Tensor, found: dict[int, int], limit: float = torch.inf) -> None:
    """Add pairs, the cheapest first, each head once."""
    for place in cost.flatten().argsort(stable=True).tolist():
        head, other = divmod(place, cost.shape[1])
        if float(cost[head, other]) > limit:
            return
        if head not in found and other not in found.values():
            found[head] = other
