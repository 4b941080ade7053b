"""Weight magnitude per head: a baseline that looks at no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer, output_of, ownership_of
from hf_attnkit.models.owners import Ownership


@dataclass(frozen=True)
class Magnitude(Score):
    """Euclidean norm of all weights of a head: its rows of query, key and value, its columns of output.

    A grouped head counts the key and value rows of its group. Biases are left out.
    """

    name = "magnitude"
    needs_batches = False

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        return [_owned(layer, ownership_of(model, layer)) for layer in layers]


def _owned(layer: AttentionLayer, own: Ownership) -> Tensor:
    """By the rows that gradients say are the head's; see `ownership`."""
    output_of(layer)
    output = layer.output_weight.float().unflatten(1, (-1, layer.value_head_dim)).square().sum((0, 2))
    total = torch.zeros(layer.num_heads, dtype=torch.float32) + output.cpu()
    parameters = dict(layer.module.named_parameters())
    for name, owners in own.owned.items():
        weight = parameters.get(name)
        if weight is None or weight.dim() < 2:
            continue
        squares = weight.detach().float().square()
        squares = squares.sum([dim for dim in range(squares.dim()) if dim != owners.dim]).cpu()
        for rows in owners.rows.values():
            sums = (rows.cpu().float() * squares).sum(1)
            total += sums if len(sums) == layer.num_heads else sums.repeat_interleave(layer.num_heads // len(sums))
    return total.sqrt()
