"""The function for Transformers' `AttentionMaskInterface`: one mask for all layers, as positions where that says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.utils.import_utils import is_tracing

MaskFunction = Callable[..., Any]


def create_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The function for `AttentionMaskInterface`: arguments as `transformers.masking_utils.sdpa_mask`.

    Plain causal, causal window and bidirectional masks, with or without padding, cost memory linear
    in the length; any other `mask_function` is evaluated into a bool matrix.
    """
    window = is_causal_window(mask_function)
    causal = window or mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        matrix: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return matrix

    visible = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if visible is not None:
        visible = visible[:, kv_offset : kv_offset + kv_length]
        # Reading values would break a compiled graph, so there the padding is kept even if empty.
        if not is_tracing(visible) and bool(visible.all()):
            visible = None
    # `None` promises that the last query is at the last key. A StaticCache's offset is a
    # tensor and its keys reach beyond the queries, so there the positions are always given.
    static = isinstance(q_offset, Tensor) or (causal and not allow_is_causal_skip)
    if visible is None and not static and not window and q_offset + q_length == kv_offset + kv_length:
        return None

    keys = torch.arange(kv_length, device=device).expand(batch_size, -1) + kv_offset
    if visible is not None:
        keys = torch.where(visible, keys, ~keys)
    queries = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, -1)
    positions = torch.cat([keys, queries], dim=1)[:, None, None, :]
    if not window:
        return positions
    return torch.cat([positions, torch.full_like(positions, _window_size(mask_function))], dim=1)


_CAUSAL_WINDOW = sliding_window_causal_mask_function(1)


def is_causal_window(mask_function: MaskFunction) -> bool:
    """Whether this is Transformers' causal window of some size, with nothing added (packed sequences).

    Never in a compiled graph, where a function's parts cannot be looked at.
    """
    if is_tracing():
        return False
    if getattr(mask_function, "__code__", None) is not _CAUSAL_WINDOW.__code__:
        return False
    parts, known = _parts(mask_function), _parts(_CAUSAL_WINDOW)
    return len(parts) == 2 and parts[1] is known[1] and parts[0].__code__ is known[0].__code__


def _window_size(mask_function: MaskFunction) -> int:
    """Of a causal window, keys that a query sees, its own included."""
    (cell,) = _parts(mask_function)[0].__closure__  # type: ignore[misc]
    return int(cell.cell_contents)


def _parts(conjunction: MaskFunction) -> tuple[MaskFunction, ...]:
    (cell,) = conjunction.__closure__  # type: ignore[misc]
    parts: tuple[MaskFunction, ...] = cell.cell_contents
    return parts
