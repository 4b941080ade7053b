"""The mean of a number per query, such as its entropy, over all queries that are no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.mask import Mask
from ..attention.registry import ATTRIBUTE, Kind
from ..families import AttentionLayer
from ..observe import observe_attention
from .online import visible_keys
from .processes import over_processes

# `(query, key, mask, scaling, window)` -> `(B, num_heads, Q)`; see `online.masked_entropy`.
Measure = Callable[[Tensor, Tensor, Mask, float, int | None], Tensor]

# Kinds of attention that are a softmax over all keys that the model's mask shows.
_SOFTMAX = ("sdpa", "eager", "mha", "gqa", "mqa", "flash")


def mean_over_queries(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    measure: Measure,
    *,
    fewest_keys: int,
    what: str,
) -> list[Tensor]:
    """For each layer `(num_heads,)`, float64: the mean over queries that are no padding and see `fewest_keys`.

    Raises:
        ValueError: for batches without such a query, attention that is no softmax over a known set of keys, and
            numbers that are not finite.
    """
    # Per layer: the heads' sums, and at the end the number of queries.
    sums = [torch.zeros(layer.num_heads + 1, dtype=torch.float64) for layer in layers]
    places = {id(layer.module): place for place, layer in enumerate(layers)}

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        place = places[id(module)]
        mask, window = _seen(layers[place], mask)
        real = visible_keys(mask, window)[:, :1] >= fewest_keys
        own = _own_key_visible(mask)
        real = real if own is None else real & own
        found = measure(query, key, mask, scaling, window).masked_fill(~real, 0.0)
        sums[place][:-1] += found.sum((0, 2), dtype=torch.float64).cpu()
        sums[place][-1] += float(real.expand(query.shape[0], 1, query.shape[2]).sum())

    observe_attention(model, batches, look, description=what)
    means = []
    for total in over_processes(layers, sums, f"the scores of attention ({what})"):
        if not total[-1]:
            raise ValueError(
                f"no query of the batches sees enough keys to have a {what}; give sequences of at least {fewest_keys} "
                "tokens"
            )
        means.append(total[:-1] / total[-1])
    return means


def _seen(layer: AttentionLayer, mask: Mask) -> tuple[Mask, int | None]:
    """What the layer's attention shows of the keys: a mask and a window."""
    kind: Kind = getattr(layer.module, ATTRIBUTE)
    if kind.name in _SOFTMAX:
        return mask.narrow(None)
    if kind.name == "sliding_window" and not kind.options.get("num_sink_tokens"):
        narrow, window = mask.narrow(kind.options["window"])
        return narrow, window
    raise ValueError(
        f"layer {layer.index} runs {kind.name!r} attention, which is no softmax over keys that its mask "
        "names; score the model before the swap, or call hf_attnkit.restore_attention(model)"
    )


def _own_key_visible(mask: Mask) -> Tensor | None:
    """`(B, 1, Q)` bool, False for padding, or `None` if there is none.

    Queries and keys are the same tokens here, so a query is padding where its own key is hidden.
    """
    if mask.dense is not None:
        return mask.dense.expand(-1, -1, mask.key_position.shape[1], -1).diagonal(dim1=-2, dim2=-1)[:, :1]
    return None if mask.key_visible is None else mask.key_visible[:, None]
