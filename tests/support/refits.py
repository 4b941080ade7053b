"""What a refit reports, computed from models that ran: by definition, and with nothing of the refit's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attnkit.models.layers import attention_layers
from hf_attnkit.refitting.options import RefitOptions


def plain(word: str) -> RefitOptions:
    """The refit whose definition is shortest: one ridge, all tokens alike, all of the calibration, always kept."""
    return RefitOptions(word, ridge=0.1, token_weights="uniform", held_out=0.0)


def seen(model: Any, index: int, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of one layer, over all real tokens: the stream before it "x" and its attention's output "y", `(tokens, m)`."""
    layer, found = attention_layers(model)[index], {"x": [], "y": []}
    handles = [
        layer.block.register_forward_hook(lambda _, args, out: found["x"].append(args[0].detach())),
        layer.output.register_forward_hook(lambda _, args, out: found["y"].append(out.detach())),
    ]
    for inputs in batches:
        model(**inputs)
    for handle in handles:
        handle.remove()
    masks = [i.get("attention_mask", torch.ones(y.shape[:2])).bool() for i, y in zip(batches, found["y"], strict=True)]
    return {name: torch.cat([t[m] for t, m in zip(parts, masks, strict=True)]) for name, parts in found.items()}


def error(changed: dict[str, Tensor], untouched: dict[str, Tensor], *, stream: bool) -> float:
    """Squared error of a layer's attention output, as a share of what it should have put out."""
    target = untouched["x"] + untouched["y"] - changed["x"] if stream else untouched["y"]
    return float((changed["y"] - target).square().sum() / target.square().sum())
