"""The function for Transformers' `AttentionMaskInterface`: one mask for all layers, as positions where that says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.utils.import_utils import is_tracing

from hf_attnkit.attention.table import KINDS

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
    in the length, and so do packed rows for a model with a kind that takes them so. Any other
    `mask_function` is evaluated into a bool matrix.
    """
    if attention_mask is None and q_length == kv_length and _takes_documents(kwargs.get("config")):
        documents = documents_of(mask_function)
        if documents is not None:
            documents = documents.to(device).expand(batch_size, -1)
            tokens = torch.arange(kv_length, device=device).expand(batch_size, -1)
            return torch.stack([tokens, documents], dim=1).repeat(1, 1, 2)[:, None]
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


def documents_of(mask_function: MaskFunction) -> Tensor | None:
    """For each token of packed rows the number of its document, `(B or 1, T)`; `None` unless this is Transformers'
    causal function with packed rows and nothing else.

    Positions within a document follow each other, so that it is causal by position where it is causal by place.
    """
    if is_tracing() or not _has_code_of(mask_function, _PACKED):
        return None
    parts = _parts(mask_function)
    documents = [part for part in parts if _has_code_of(part, _DOCUMENTS)]
    others = [part for part in parts if not _has_code_of(part, _DOCUMENTS)]
    if len(documents) != 1 or len(others) != 1:
        return None
    causal = others[0]
    if _BY_POSITION is not None and _has_code_of(causal, _BY_POSITION):
        causal = _held(causal)["mask_function"]
    return _held(documents[0])["packed_sequence_mask"] if causal is causal_mask_function else None


def _takes_documents(config: Any) -> bool:
    """Whether one of the kinds that the config names takes packed rows as documents instead of as a matrix."""
    saved = getattr(config, "hf_attnkit", None) or {}
    kinds = {entry[0] for entry in saved.get("layers", {}).values()}  # it may say of removed heads alone
    return any(name in KINDS and KINDS[name].takes_documents for name in kinds)


def _has_code_of(function: MaskFunction, other: MaskFunction) -> bool:
    return getattr(function, "__code__", None) is other.__code__


def _held(function: MaskFunction) -> dict[str, Any]:
    """What an inner function takes from the one around it, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


# Examples of what Transformers makes, to know its functions by their code.
_DOCUMENTS = packed_sequence_mask_function(torch.zeros(1, 1))
_PACKED = and_masks(causal_mask_function, _DOCUMENTS)
# Not in every version that is allowed.
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_BY_POSITION = None if _remap is None else _remap(causal_mask_function, torch.zeros(1, 1))
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
