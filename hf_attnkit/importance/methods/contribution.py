"""What a head adds to the residual stream, less its mean over tokens, which a bias could add as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.importance.processes import over_processes
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer, output_of
from hf_attnkit.observing.batches import real_tokens, run_batches


@dataclass(frozen=True)
class Contribution(Score):
    """sqrt(mean over real tokens of |W_oh (a_h - mean a_h)|^2): the standard deviation over tokens of what is added.

    W_oh are the columns of the output projection that belong to the head. No labels, no gradient. At least 0, in units
    of the residual stream.
    """

    name = "contribution"

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        # Per layer and head sum_t [a; 1] [a; 1]^T, from which any mean and variance follows.
        sizes = [(layer.num_heads, layer.value_head_dim + 1, layer.value_head_dim + 1) for layer in layers]
        sums = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        inputs: dict[str, Any] = {}

        def hook(layer: AttentionLayer, total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                heads = (
                    real_tokens(args[0], inputs, layer.padding, layer.of_length)
                    .unflatten(-1, (layer.num_heads, layer.value_head_dim))
                    .double()
                )
                heads = torch.cat([heads, heads.new_ones(*heads.shape[:2], 1)], dim=-1).transpose(0, 1)
                total.add_((heads.transpose(1, 2) @ heads).cpu())

            return look

        with ExitStack() as stack:
            for layer, total in zip(layers, sums, strict=True):
                stack.callback(output_of(layer).register_forward_pre_hook(hook(layer, total)).remove)
            for batch, run in run_batches(model, batches, description="contribution"):
                inputs.clear()
                inputs.update(batch)
                run()
        scores = []
        for layer, total in zip(layers, over_processes(layers, sums, "the heads' outputs"), strict=True):
            moments = total / total[:, -1:, -1:]
            mean = moments[:, :-1, -1]
            covariance = moments[:, :-1, :-1] - mean[:, :, None] * mean[:, None]
            weight = layer.output_weight.to("cpu", torch.float64).unflatten(1, (-1, layer.value_head_dim))
            scores.append(torch.einsum("mhi,hij,mhj->h", weight, covariance, weight).clamp(min=0).sqrt().float())
        return scores
