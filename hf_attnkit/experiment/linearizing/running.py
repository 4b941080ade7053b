"""What the layers of a swapped model run, for a while: nothing else changes, and nothing is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import ATTRIBUTE, Kind
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
