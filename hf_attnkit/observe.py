"""Run batches through a model and look at every attention call, whatever implementation it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .attention.registry import ATTRIBUTE, NAME, Kind, Observer, observe
from .change import is_swapped, require_consistent
from .families import attention_layers
from .forward import run_batches
from .swap import STOCK


@contextmanager
def visible_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lead the model's attention through our interface for a while, each layer running what it ran.

    Fused kernels whose masks are not tensors (flash-attention, FlexAttention) are stood in for by SDPA.
    """
    layers = attention_layers(model)
    require_consistent(model, layers)
    if is_swapped(model):
        yield
        return
    before = model.config._attn_implementation
    try:
        for layer in layers:
            setattr(layer.module, ATTRIBUTE, Kind(before if before in STOCK else "sdpa"))
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for layer in layers:
            if hasattr(layer.module, ATTRIBUTE):
                delattr(layer.module, ATTRIBUTE)


def observe_attention(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], observer: Observer, *, description: str
) -> None:
    """Run every batch in evaluation mode without gradients, calling `observer` at each attention call.

    Raises:
        ValueError: if `batches` is empty, or a batch is no mapping.
    """
    with visible_attention(model), observe(observer):
        for _, run in run_batches(model, batches, description=description):
            run()
