"""What layers run: for a while, or by a swap that does not warn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.attention.kind import ATTRIBUTE, Kind
from hf_attnkit.common.options import changed
from hf_attnkit.models.layers import AttentionLayer, attention_layers


@contextmanager
def running(kinds: Mapping[nn.Module, Kind]) -> Iterator[None]:
    """These attention modules, which run kinds of ours, run these instead while the block runs."""
    before = {module: getattr(module, ATTRIBUTE) for module in kinds}
    try:
        for module, kind in kinds.items():
            setattr(module, ATTRIBUTE, kind)
        yield
    finally:
        for module, kind in before.items():
            setattr(module, ATTRIBUTE, kind)


def layers_of(model: PreTrainedModel, kind: type[Kind]) -> list[AttentionLayer]:
    """The layers that run a kind."""
    return [layer for layer in attention_layers(model) if isinstance(getattr(layer.module, ATTRIBUTE, None), kind)]


def swap_quietly(model: PreTrainedModel, kind: Kind, layers: list[int], **more: Any) -> None:
    """Swap these layers, without the warning that training has to follow: it does, or the table shows what is missing.

    Args:
        more: `calibration` and `refit` of `swap_attention`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*another function than softmax")
        hf_attnkit.swap_attention(model, kind.name, layers=layers, **more, **changed(kind))
