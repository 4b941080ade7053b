"""`head_importance`: one call for every scoring method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.registry import check_options
from ..families import editable_layers
from . import entropy, magnitude, random

# method -> module with `score(model, layers, batches, **options)`: a list of `(num_heads,)` per layer,
# higher = keep, and `check(**options)`, whose keywords are the options; `NEEDS_BATCHES = False` where it
# looks at no data.
METHODS: dict[str, ModuleType] = {
    "entropy": entropy,
    "magnitude": magnitude,
    "random": random,
}


def head_importance(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    method: str = "entropy",
    **options: Any,
) -> Tensor:
    """Score every attention head.

    Args:
        model: a model of a supported family; unchanged.
        batches: model inputs, such as a `DataLoader` gives; they are moved to the model's device.
            Score on training data. "magnitude" and "random" need none.
        method: "entropy", "magnitude" or "random".
        options: the method's own: `direction` ("focused" or "diffuse") and `normalize` of "entropy",
            `seed` of "random".

    Returns:
        `(num_layers, num_heads)`, float32, higher = keep. Where layers have different numbers of
        heads, the places of the missing ones hold NaN; all of a layer's where it has no head left.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: unknown method or option, no or empty batches, a model that is not supported.
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
