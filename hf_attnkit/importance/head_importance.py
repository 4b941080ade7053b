"""`head_importance`: one call for every scoring method."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common import options as score_options
from hf_attnkit.common.state import plain_mode
from hf_attnkit.importance.methods.confidence import Confidence
from hf_attnkit.importance.methods.contribution import Contribution
from hf_attnkit.importance.methods.entropy import Entropy
from hf_attnkit.importance.methods.entropy_contribution import EntropyContribution
from hf_attnkit.importance.methods.fisher import Fisher
from hf_attnkit.importance.methods.gradient import Gradient
from hf_attnkit.importance.methods.l0 import L0
from hf_attnkit.importance.methods.magnitude import Magnitude
from hf_attnkit.importance.methods.random import Random
from hf_attnkit.importance.methods.reach import Reach
from hf_attnkit.importance.methods.taylor import Taylor
from hf_attnkit.importance.score import Score
from hf_attnkit.models.layers import scored_layers

_ALL: tuple[type[Score], ...] = (
    Entropy,
    Contribution,
    EntropyContribution,
    Gradient,
    Taylor,
    Fisher,
    Confidence,
    L0,
    Reach,
    Magnitude,
    Random,
)

METHODS: dict[str, type[Score]] = {score.name: score for score in _ALL}
"""Name of a method -> its class."""


@plain_mode()
def head_importance(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    method: str = "entropy_contribution",
    **options: Any,
) -> Tensor:
    """Score every attention head.

    Where `torch.distributed` runs several processes (accelerate, torchrun), each gives its own share of the batches,
    all of them call this, and all get the scores of one process on all batches.

    Args:
        model: any model with attention; unchanged.
        batches: model inputs, such as a `DataLoader` gives; they are moved to the model's device.
            Score on training data. "magnitude" and "random" need none. "gradient", "taylor", "fisher" and "l0" need
            the loss, so batches with `labels` (of causal language models the input serves for them).
        method: a key of `hf_attnkit.importance.METHODS`; docs/importance.md defines them. The default joins where a
            head looks with what it adds: neither labels nor gradients, and better than random heads.
        options: the method's own: the fields of its class in `METHODS`, with their defaults there. For example
            `labels="predicted"` for the scores that need the loss.

    Returns:
        `(num_layers, num_heads)`, float32, higher = keep. Where layers have different numbers of
        heads, the places of the missing ones hold NaN; all of a layer's where it has no head left, or
        heads that nothing shows (PyTorch's `nn.MultiheadAttention` in SigLIP), which a warning names.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: unknown method or option, no or empty batches, a batch that is all padding, missing labels,
            activations or gradients that are not finite, a model that is not supported. The model is unchanged.
    """
    score = make_score(method, options)
    if batches is None and score.needs_batches:
        raise ValueError(f"importance method {method!r} looks at data; give batches of model inputs")
    layers = scored_layers(model)
    opaque = [layer.name for layer in layers if layer.is_opaque]
    able = [layer for layer in layers if not layer.is_opaque] or layers  # of which the method says why not
    scores = score.score(model, able, () if batches is None else batches)
    if opaque:
        warnings.warn(
            f"{', '.join(opaque)} of {type(model).__name__}: its heads can neither be looked at nor told, as those of "
            "nn.MultiheadAttention; their scores are NaN, and it is not pruned",
            stacklevel=3,
        )
    importance = torch.full((len(layers), max(layer.num_heads for layer in layers)), torch.nan)
    for layer, layer_scores in zip(able, scores, strict=True):
        importance[layer.index, : len(layer.heads)] = layer_scores[: len(layer.heads)]
    return importance


def make_score(method: str, options: Mapping[str, Any]) -> Score:
    """The method with these options; what `head_importance` computes.

    Raises:
        ValueError: for an unknown method, an option that it does not have, or a bad value of one.
    """
    if method not in METHODS:
        raise ValueError(f"unknown importance method {method!r}; available: {', '.join(METHODS)}")
    return score_options.make(f"importance method {method!r}", METHODS[method], options)
