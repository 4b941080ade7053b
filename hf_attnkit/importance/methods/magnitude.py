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
    squares: dict[str, Tensor] = {}  # by role, one for each head of that role
    parameters = dict(layer.module.named_parameters())
    for name, owners in own.owned.items():
        weight = parameters.get(name)
        if weight is None or weight.dim() < 2:
            continue
        for role, rows in owners.rows.items():
            found = _squares(weight.detach().movedim(owners.dim, 0), rows.to(weight.device)).cpu()
            squares[role] = squares[role] + found if role in squares else found
    by_head = {role: found.repeat_interleave(layer.num_heads // len(found)) for role, found in squares.items()}
    nothing = torch.zeros(layer.num_heads)
    query, key, value, own_output = (by_head.get(role, nothing) for role in ("query", "key", "value", "output"))
    output = layer.output_weight.float().unflatten(1, (-1, layer.value_head_dim)).square().sum((0, 2)).cpu()
    return (query + (key + value) + own_output + output).sqrt()


def _squares(weight: Tensor, rows: Tensor) -> Tensor:
    """Sum of squares of each head's rows `(heads,)`; `rows` as of `Owners`, of the first dimension."""
    counts = rows.sum(1)
    if bool((counts != counts[0]).any()):
        return torch.stack([weight[own].float().square().sum() for own in rows])
    heads = weight[rows.nonzero()[:, 1]].float().unflatten(0, (len(rows), -1))
    return heads.square().flatten(1).sum(1)
