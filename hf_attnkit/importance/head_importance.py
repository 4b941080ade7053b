"""`head_importance`: one call for every scoring method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention.table import check_options
from hf_attnkit.common.state import plain_mode
from hf_attnkit.importance.methods import (
    confidence,
    contribution,
    entropy,
    entropy_contribution,
    fisher,
    gradient,
    l0,
    magnitude,
    random,
    taylor,
)
from hf_attnkit.models.layers import editable_layers

# method -> module with `score(model, layers, batches, **options)`: a list of `(num_heads,)` per layer,
# higher = keep, and `check(**options)`, whose keywords are the options; `NEEDS_BATCHES = False` where it
# looks at no data. What is summed over batches goes through `over_processes`.
METHODS: dict[str, ModuleType] = {
    "entropy": entropy,
    "contribution": contribution,
    "entropy_contribution": entropy_contribution,
    "gradient": gradient,
    "taylor": taylor,
    "fisher": fisher,
    "confidence": confidence,
    "l0": l0,
    "magnitude": magnitude,
    "random": random,
}


@plain_mode()
def head_importance(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    method: str = "entropy",
    **options: Any,
) -> Tensor:
    """Score every attention head.

    Where `torch.distributed` runs several processes (accelerate, torchrun), each gives its own share of the batches,
    all of them call this, and all get the scores of one process on all batches.

    Args:
        model: a model of a supported family; unchanged.
        batches: model inputs, such as a `DataLoader` gives; they are moved to the model's device.
            Score on training data. "magnitude" and "random" need none. "gradient", "taylor", "fisher" and "l0" need
            the loss, so batches with `labels` (of causal language models the input serves for them).
        method: a key of `hf_attnkit.importance.METHODS`; docs/importance.md defines them.
        options: the method's own: `direction` ("focused" or "diffuse") and `normalize` of "entropy"; `joint`
            ("product" or "hies"), `alpha` and `labels` of "entropy_contribution"; `labels` ("given" or "predicted")
            of "gradient", "taylor" and "fisher"; `steps`, `penalty`, `learning_rate`, `seed` and `labels` of "l0";
            `seed` of "random".

    Returns:
        `(num_layers, num_heads)`, float32, higher = keep. Where layers have different numbers of
        heads, the places of the missing ones hold NaN; all of a layer's where it has no head left.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: unknown method or option, no or empty batches, a batch that is all padding, missing labels,
            activations or gradients that are not finite, a model that is not supported. The model is unchanged.
    """
    check_method(method, options)
    implementation = METHODS[method]
    if batches is None and getattr(implementation, "NEEDS_BATCHES", True):
        raise ValueError(f"importance method {method!r} looks at data; give batches of model inputs")
    layers = editable_layers(model)
    scores = implementation.score(model, layers, batches, **options)
    importance = torch.full((len(layers), max(layer.num_heads for layer in layers)), torch.nan)
    for row, layer, layer_scores in zip(importance, layers, scores, strict=True):
        row[: len(layer.heads)] = layer_scores[: len(layer.heads)]
    return importance


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an unknown method, an option that it does not have, or a bad value of one."""
    if method not in METHODS:
        raise ValueError(f"unknown importance method {method!r}; available: {', '.join(METHODS)}")
    check_options(f"importance method {method!r}", METHODS[method].check, options)
