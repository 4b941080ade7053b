"""What each layer's linearisation costs: the model's outputs when that layer alone is linear, against softmax in all.

A few layers cost most, and a hybrid that keeps softmax attention in these loses little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import ATTRIBUTE, Kind
from hf_attnkit.attention.kinds.gqa import GroupedQueryAttention
from hf_attnkit.common.progress import progress_bar
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.experiment.linearizing.running import running
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.batches import to_device
from hf_attnkit.observing.outputs import real_outputs, run_whole

# Log-probabilities of a large vocabulary at a time: 128 MiB in float64.
CHUNK = 2**24


def layer_costs(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Iterable[Mapping[str, Any]]
) -> dict[int, float]:
    """For each layer the mean KL divergence of the outputs, in nats; 0 costs nothing.

    Over sequences, or over the real tokens of a causal model. Where there is one output, as in regression, it is the
    mean squared difference.

    Args:
        layers: of the model, running what they are to run.
    """
    stock = {layer.module: GroupedQueryAttention() for layer in layers}
    own = {layer.index: getattr(layer.module, ATTRIBUTE) for layer in layers}
    inputs = [to_device(batch, model) for batch in batches]
    totals, count = dict.fromkeys(own, 0.0), 0
    with torch.no_grad(), evaluation_mode(model):
        for batch in progress_bar(inputs, description="layer costs", unit="batch"):
            batch = {name: value for name, value in batch.items() if name != "labels"}
            wanted = _outputs(model, batch, stock)
            count += len(wanted)
            for layer in layers:
                found = _outputs(model, batch, {**stock, layer.module: own[layer.index]})
                totals[layer.index] += divergence(found, wanted)
    return {index: total / count for index, total in totals.items()}


def divergence(found: Tensor, wanted: Tensor) -> float:
    """The sum over positions of KL(wanted || found), or of the squared difference of single outputs.

    Args:
        found, wanted: `(positions, classes)`.
    """
    if wanted.shape[-1] == 1:
        return float((found.double() - wanted.double()).square().sum())
    rows = max(CHUNK // wanted.shape[-1], 1)
    total = 0.0
    for parts in zip(found.split(rows), wanted.split(rows), strict=True):
        now, was = (F.log_softmax(part.double(), dim=-1) for part in parts)
        total += float(F.kl_div(now, was, reduction="sum", log_target=True))
    return total


def costliest(costs: Mapping[int, float], number: int) -> list[int]:
    """The layers with the highest costs, in order."""
    return sorted(sorted(costs, key=lambda index: costs[index], reverse=True)[:number])


def uniform(layers: Sequence[int], number: int) -> list[int]:
    """So many of the layers, spread evenly: each is the middle one of an equal share."""
    return [layers[int((place + 0.5) * len(layers) / number)] for place in range(number)]


def _outputs(model: PreTrainedModel, batch: Mapping[str, Any], kinds: Mapping[Any, Kind]) -> Tensor:
    with running(kinds):
        [(name, output), *_] = run_whole(model, batch).items()
    return real_outputs(name, output, batch)
