"""The mean of a number per query, such as its entropy, over all queries that are no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.mask import Mask
from hf_attnkit.importance.online import visible_keys
from hf_attnkit.importance.processes import over_processes
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.attention_calls import has_softmax, real_queries, visible_attention
from hf_attnkit.observing.batches import run_batches

# `(query, key, mask, scaling, window)` -> `(B, num_heads, Q)`; see `online.masked_entropy`.
Measure = Callable[[Tensor, Tensor, Mask, float, int | None], Tensor]


class QuerySums:
    """Sums a number per query over the queries that are no padding, for each head: an observer of attention calls.

    Args:
        layers: other layers are not looked at.
        fewest_keys: queries that see fewer keys do not count.
        what: the number's name, for messages.
        inputs: the batch, for layers whose queries and keys are of two sequences; set it before each.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        measure: Measure,
        *,
        fewest_keys: int,
        what: str,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._layers, self._measure, self._fewest_keys, self._what = list(layers), measure, fewest_keys, what
        self.inputs: Mapping[str, Any] = inputs or {}
        self._places = {id(layer.module): place for place, layer in enumerate(layers)}
        # Per layer: the heads' sums, and at the end the numbers of queries and of calls.
        self._sums = [torch.zeros(layer.num_heads + 2, dtype=torch.float64) for layer in layers]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float
    ) -> None:
        place = self._places.get(id(module))
        if place is None:
            return
        layer = self._layers[place]
        if not has_softmax(module):
            raise ValueError(
                f"layer {layer.index} runs linear attention, which is no softmax of scores and has no {self._what}; "
                "score the model before the swap, or call hf_attnkit.restore_attention(model)"
            )
        own = real_queries(layer, mask, self.inputs)
        mask, window = mask.narrow(None)
        real = visible_keys(mask, window)[:, :1] >= self._fewest_keys
        real = real if own is None else real & own[:, None]
        found = self._measure(query, key, mask, scaling, window).masked_fill(~real, 0.0)
        self._sums[place][:-2] += found.sum((0, 2), dtype=torch.float64).cpu()
        self._sums[place][-1] += 1
        self._sums[place][-2] += float(real.expand(query.shape[0], 1, query.shape[2]).sum())

    def look_at(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
        """Run every batch in evaluation mode without gradients, and sum over its attention calls.

        Raises:
            ValueError: if `batches` is empty, or a batch is no mapping.
        """
        with visible_attention(model, only=self._layers), observe(self):
            for batch, run in run_batches(model, batches, description=self._what):
                self.inputs = batch
                run()

    def means(self) -> list[Tensor]:
        """For each layer `(num_heads,)`, float64, over all processes; NaN for one that was not called.

        A decoder's cross-attention is not, where the decoder runs alone.

        Raises:
            ValueError: if a layer that was called had no query to look at, or a number is not finite.
        """
        means = []
        sums = over_processes(self._layers, self._sums, f"the scores of attention ({self._what})")
        for total in sums:
            if not total[-1] and any(each[-1] for each in sums):
                means.append(torch.full_like(total[:-2], torch.nan))
                continue
            if not total[-2]:
                raise ValueError(
                    f"no query of the batches sees enough keys for a score by {self._what}; give sequences of at least "
                    f"{self._fewest_keys} tokens"
                )
            means.append(total[:-2] / total[-2])
        return means


def mean_over_queries(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    measure: Measure,
    *,
    fewest_keys: int,
    what: str,
) -> list[Tensor]:
    """For each layer `(num_heads,)`, float64: the mean over queries that are no padding and see `fewest_keys`.

    Raises:
        ValueError: for batches without such a query, linear attention, and numbers that are not finite.
    """
    sums = QuerySums(layers, measure, fewest_keys=fewest_keys, what=what)
    sums.look_at(model, batches)
    return sums.means()
