"""Transformers' own attention with a window, from the distances alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.layers import attention_layers


@contextmanager
def windows(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Transformers' own attention, with a band in its masks; made here, from the distances alone."""
    modules = [layer.module for layer in attention_layers(model)]

    def banded(call: Call) -> tuple[Tensor, Any]:
        queries, keys = call.query.shape[2], call.key.shape[2]
        if queries != keys:
            return call.run()
        at = torch.arange(keys)
        band = (at[:, None] - at).abs() < window
        if call.mask is None:
            flag = call.keywords.get("is_causal")
            flag = call.module.is_causal if flag is None else flag
            call.mask = torch.zeros(1, 1, keys, keys, dtype=call.query.dtype)
            if flag:
                call.mask = call.mask.masked_fill(at[:, None] < at, torch.finfo(call.query.dtype).min)
            call.keywords["is_causal"] = False
        lowest = torch.finfo(call.query.dtype).min
        if call.mask.dtype == torch.bool:
            call.mask = call.mask & band
        else:
            call.mask = call.mask.to(call.query.dtype).masked_fill(~band, lowest)
        return call.run()

    with watched(modules, banded):
        yield
