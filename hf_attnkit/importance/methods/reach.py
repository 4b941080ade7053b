"""What is lost in the residual stream when a head sees only the first tokens and a window.

The score for heads that may stream (`streaming_heads` attention), not for heads that may go: a head that writes much
and reads near has a low reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.dispatch import edit, observe
from hf_attnkit.attention.kernels import backends, capped
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.checks import choice, integer
from hf_attnkit.common.options import store
from hf_attnkit.common.state import evaluation_mode, frozen
from hf_attnkit.importance.processes import over_processes
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.discovery import require_gradients
from hf_attnkit.models.layers import AttentionLayer, output_of
from hf_attnkit.observing.attention_calls import has_softmax, real_queries, visible_attention
from hf_attnkit.observing.batches import on_device, run_batches
from hf_attnkit.observing.outputs import batch_generator, mixed, run_whole, vocabulary_of

MEASURES = ("stream", "outputs")


@dataclass(frozen=True)
class Reach(Score):
    """What is lost when the head sees only the first tokens and a window, a mean over real queries; at least 0.

    a_h is the head's output, b_h its output from the first tokens and the window alone, for the same query. NaN for
    cross-attention. No labels; memory is linear in the length.

    "stream": |W_oh (a_h - b_h)|^2 in squared units of the residual stream, W_oh the columns of the output projection
    that belong to the head. A forward pass. Gates and norms between heads and projection (Qwen3-Next, BitNet) are left
    out, which "outputs" has.

    "outputs": what that query's loss in this head does to the model's outputs z, to first order:
    |dz/da_h (a_h - b_h)|^2 in squared units of z, summed over all real outputs (logits, or last hidden states). Of a
    language model twice the Kullback-Leibler divergence of its next words, in nats. Estimated with one draw for each
    batch, by a forward and a backward pass, which takes the memory of a training step without gradients of parameters.

    Attributes:
        window: number of keys on each side of a query, its own included.
        num_sink_tokens: how many of the first tokens (after left padding) are seen as well.
        measure: where the loss counts, "stream" or "outputs".
    """

    name = "reach"

    window: int = 256
    num_sink_tokens: int = 4
    measure: str = "stream"

    def __post_init__(self) -> None:
        choice(self.measure, "measure", MEASURES)
        store(
            self,
            window=integer(self.window, "window", minimum=1, why="the number of keys, the own one included"),
            num_sink_tokens=integer(self.num_sink_tokens, "num_sink_tokens", minimum=0),
        )

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        for layer in layers:
            output_of(layer)  # refuses one without before the batches run
        window = SlidingWindowAttention(self.window, self.num_sink_tokens)
        with visible_attention(model, only=layers):
            sums = (
                _in_stream(model, layers, batches, window)
                if self.measure == "stream"
                else _in_outputs(model, layers, batches, window)
            )
        added = over_processes(layers, sums, "the heads' reach")
        scores = [(total[:-1] / total[-1]).float() for total in added]
        if not any(score.isfinite().any() for score in scores):
            raise ValueError("no self-attention of the batches was called with a real token; give text")
        return scores


def _in_stream(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches, window: SlidingWindowAttention
) -> list[Tensor]:
    """Per layer the heads' sums over real queries, and the queries' number: `(num_heads + 1,)`, float64."""
    # sum (a - b) (a - b)^T of each head
    moments = [
        torch.zeros(layer.num_heads, layer.value_head_dim, layer.value_head_dim, dtype=torch.float64)
        for layer in layers
    ]
    counts = torch.zeros(len(layers), dtype=torch.float64)

    def add(place: int, lost: Tensor, number: int) -> None:
        lost = lost.double()
        moments[place] += torch.einsum("bhqi,bhqj->hij", lost, lost).cpu()
        counts[place] += number

    differences = _Differences(layers, window, add)
    with observe(differences):
        for batch, run in run_batches(model, batches, description="reach"):
            differences.inputs = batch
            run()
    sums = []
    for layer, moment, count in zip(layers, moments, counts, strict=True):
        weight = layer.output_weight.to("cpu", torch.float64).unflatten(1, (-1, layer.value_head_dim))
        lost = torch.einsum("mhi,hij,mhj->h", weight, moment, weight).clamp(min=0)
        sums.append(torch.cat([lost, count[None]]))
    return sums


def _in_outputs(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches, window: SlidingWindowAttention
) -> list[Tensor]:
    """The same of what the loss does to the model's outputs.

    A gate on a_h - b_h of each query and head has the gradient r . dz/da_h (a_h - b_h), r as `mixed` draws it.
    """
    require_gradients(model)
    sums = [torch.zeros(layer.num_heads + 1, dtype=torch.float64) for layer in layers]
    lost: list[tuple[int, Tensor]] = []  # of the call that is about to attend
    gates: list[tuple[int, Tensor]] = []

    def note(place: int, difference: Tensor, number: int) -> None:
        lost.append((place, difference.transpose(1, 2)))
        sums[place][-1] += number

    def open_gates(module: nn.Module, output: Tensor) -> Tensor:
        if not lost:  # a layer that is not looked at
            return output
        place, difference = lost.pop()
        gate = torch.zeros(difference.shape[:-1], dtype=difference.dtype, device=output.device, requires_grad=True)
        gates.append((place, gate))
        return output + (gate[..., None] * difference).to(output.dtype)

    differences = _Differences(layers, window, note)
    for batch in on_device(model, batches, description="reach"):
        differences.inputs = batch
        with torch.enable_grad(), evaluation_mode(model), frozen(model), observe(differences), edit(open_gates):
            outputs = run_whole(model, batch, use_cache=False)
            if not gates:
                continue
            changed = mixed(outputs, batch, batch_generator(batch), vocabulary_of(model))
            # Not all that is computed is put out: LLaVA takes the features of an earlier layer.
            gradients = torch.autograd.grad(
                changed, [gate for _, gate in gates], allow_unused=True, materialize_grads=True
            )
        for (place, _), gradient in zip(gates, gradients, strict=True):
            sums[place][:-1] += gradient.double().square().sum((0, 1)).cpu()
        gates.clear()
    return sums


class _Differences:
    """Gives `add` for each attention call: the layer's place, a - b `(B, num_heads, Q, value_head_dim)` with 0 for
    padding, and the number of real queries.

    Attributes:
        inputs: the batch that runs.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        window: SlidingWindowAttention,
        add: Callable[[int, Tensor, int], None],
    ) -> None:
        self.layers, self.window = {id(layer.module): (place, layer) for place, layer in enumerate(layers)}, window
        self.add = add
        self.inputs: Mapping[str, Any] = {}

    @torch.no_grad()
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
        lost = self._attend(query, key, value, mask, scaling)
        if real is not None:
            lost = lost * real.expand(query.shape[0], -1)[:, None, :, None]
        count = query.shape[0] * query.shape[2] if real is None else int(real.expand(query.shape[0], -1).sum())
        self.add(place, lost, count)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> Tensor:
        """What each query loses in each head, `(B, num_heads, Q, value_head_dim)`."""
        if mask.softcap is not None or mask.sinks is not None:
            seen = mask.as_matrix(), self.window.seen(mask, key.shape)
            far, near = (capped.attention(query, key, value, one, scaling=scaling)[0] for one in seen)
            return far - near
        near, _ = self.window.attention(query, key, value, mask, scaling=scaling)
        mask, window = mask.narrow(None)
        return backends.attend(query, key, value, mask, scaling=scaling, window=window) - near
