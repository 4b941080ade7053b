"""What is lost in the residual stream when a head sees only the first tokens and a window.

The score for heads that may stream (`streaming_heads` attention), not for heads that may go: a head that writes much
and reads near has a low reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.kernels import backends, capped
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store
from hf_attnkit.importance.processes import over_processes
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer, output_of
from hf_attnkit.observing.attention_calls import has_softmax, real_queries, visible_attention
from hf_attnkit.observing.batches import run_batches


@dataclass(frozen=True)
class Reach(Score):
    """mean over real queries of |W_oh (a_h - b_h)|^2, in squared units of the residual stream; at least 0.

    a_h is the head's output, b_h its output from the first tokens and the window alone, W_oh the columns of the output
    projection that belong to the head. No labels, no gradient; memory is linear in the length. NaN for cross-attention.

    Attributes:
        window: number of keys on each side of a query, its own included.
        num_sink_tokens: how many of the first tokens (after left padding) are seen as well.
    """

    name = "reach"

    window: int = 256
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        store(
            self,
            window=integer(self.window, "window", minimum=1, why="the number of keys, the own one included"),
            num_sink_tokens=integer(self.num_sink_tokens, "num_sink_tokens", minimum=0),
        )

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        for layer in layers:
            output_of(layer)  # refuses one without before the batches run
        differences = _Differences(layers, SlidingWindowAttention(self.window, self.num_sink_tokens))
        with visible_attention(model, only=layers), observe(differences):
            for batch, run in run_batches(model, batches, description="reach"):
                differences.inputs = batch
                run()
        scores = []
        for layer, total in zip(layers, over_processes(layers, differences.sums, "the heads' reach"), strict=True):
            weight = layer.output_weight.to("cpu", torch.float64).unflatten(1, (-1, layer.value_head_dim))
            lost = torch.einsum("mhi,hij,mhj->h", weight, total[:, :-1, :-1], weight).clamp(min=0)
            scores.append((lost / total[:, -1, -1]).float())
        if not any(score.isfinite().any() for score in scores):
            raise ValueError("no self-attention of the batches was called with a real token; give text")
        return scores


class _Differences:
    """Per layer and head sum_t (a - b) (a - b)^T over real queries, and in the last place their number."""

    def __init__(self, layers: Sequence[AttentionLayer], window: SlidingWindowAttention) -> None:
        self.layers, self.window = {id(layer.module): (place, layer) for place, layer in enumerate(layers)}, window
        sizes = [(layer.num_heads, layer.value_head_dim + 1, layer.value_head_dim + 1) for layer in layers]
        self.sums = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self.inputs: Mapping[str, Any] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float
    ) -> None:
        place, layer = self.layers.get(id(module), (None, None))
        if place is None or layer is None or layer.is_cross:
            return
        if not has_softmax(module):
            raise ValueError(
                f"layer {layer.index} runs linear attention, which has no window to compare with; score the model "
                "before the swap, or call hf_attnkit.restore_attention(model)"
            )
        real = real_queries(layer, mask, self.inputs)
        lost = self._attend(query, key, value, mask, scaling).double()
        if real is not None:
            lost = lost * real.expand(query.shape[0], -1)[:, None, :, None]
        count = query.shape[0] * query.shape[2] if real is None else int(real.expand(query.shape[0], -1).sum())
        self.sums[place][:, :-1, :-1] += torch.einsum("bhqi,bhqj->hij", lost, lost).cpu()
        self.sums[place][:, -1, -1] += count

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> Tensor:
        """What each query loses in each head, `(B, num_heads, Q, value_head_dim)`."""
        if mask.softcap is not None or mask.sinks is not None:
            seen = mask.as_matrix(), self.window.seen(mask, key.shape)
            far, near = (capped.attention(query, key, value, one, scaling=scaling)[0] for one in seen)
            return far - near
        near, _ = self.window.attention(query, key, value, mask, scaling=scaling)
        mask, window = mask.narrow(None)
        return backends.attend(query, key, value, mask, scaling=scaling, window=window) - near
