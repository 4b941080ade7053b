"""Run batches through a model and look at every attention call, whatever implementation it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attention.registry import ATTRIBUTE, NAME, Kind, Observer, observe
from ..change import evaluation_mode, is_swapped, require_consistent
from ..families import attention_layers, input_device
from ..swap import STOCK


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
    device = input_device(model)
    seen = 0
    with torch.no_grad(), evaluation_mode(model), visible_attention(model), observe(observer):
        for batch in tqdm(batches, desc=description, unit="batch"):
            model(**to_device(batch, device))
            seen += 1
    if not seen:
        raise ValueError(
            "batches is empty; give at least one batch of model inputs (an iterator is spent after one use)"
        )


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on `device`, labels left out: scores that observe need no loss."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch must be a mapping of model inputs such as {{'input_ids': ..., 'attention_mask': ...}}, got "
            f"{type(batch).__name__}"
        )
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "label")
    }
