"""Weight magnitude per head: a baseline that looks at no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Magnitude(Score):
    """Euclidean norm of all weights of a head: its rows of query, key and value, its columns of output.

    A grouped head counts the key and value rows of its group. Biases are left out.
    """

    name = "magnitude"
    needs_batches = False

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        scores = []
        for layer in layers:
            query, key, value = (
                getattr(layer, name)
                .weight.detach()[layer.rows(name)]
                .float()
                .unflatten(0, (-1, layer.head_dim))
                .square()
                .sum((1, 2))
                for name in ("query", "key", "value")
            )
            output = layer.output.weight.detach().float().unflatten(1, (-1, layer.head_dim)).square().sum((0, 2))
            shared = (key + value).repeat_interleave(layer.group_size)
            scores.append((query + shared + output).sqrt().cpu())
        return scores
