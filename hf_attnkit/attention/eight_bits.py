"""Keys and values in 8 bits, one scale for each token and head.

    [ q_0 q_1 ... q_(D-1) | s s ]      D bytes, and the two of the scale, a bfloat16        x_i = q_i * s

The scale is the largest magnitude of the token's D numbers over the largest that 8 bits say: 127, or 448 of
float8_e4m3fn. A number is off by at most half a step: `s / 2` in int8; in float8 `|x| / 16`, or `s / 1024` where that
is more. bfloat16 rounds the scale itself by at most 1/512, which `q` takes in: 127 * (1 + 1/512) rounds to 127.

Numbers and scale in one tensor of bytes can be joined, chosen and moved like the floats that they are for. Its dtype
says what they are: torch.int8 is "int8", torch.uint8 is "float8_e4m3fn".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.common.checks import choice

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
STORED = {"int8": torch.int8, "float8_e4m3fn": torch.uint8}
SCALE_BYTES = 2
BLOCK = 1024  # tokens that are floats at the same time


def check_cache_dtype(cache_dtype: Any) -> None:
    """Raise `ValueError` unless it is `None` or the name of 8 bits."""
    if cache_dtype is not None:
        choice(cache_dtype, "cache_dtype", LARGEST, why="or None for the model's own")


def is_encoded(states: Tensor) -> bool:
    """Whether these are 8 bits with their scales, and not the numbers themselves."""
    return not states.is_floating_point()


def encode(states: Tensor, cache_dtype: str) -> Tensor:
    """`(..., D)` in floats to `(..., D + 2)` in bytes."""
    stored, limit = STORED[cache_dtype], LARGEST[cache_dtype]
    if not states.numel():
        return states.new_empty(*states.shape[:-1], states.shape[-1] + SCALE_BYTES, dtype=stored)
    states = states if states.dtype == torch.float64 else states.float()
    scale = (states.abs().amax(-1, keepdim=True) / limit).to(torch.bfloat16)
    # A scale of 0 has nothing to divide; one that is not finite stays, so that what comes back is not finite either.
    steps = (states / scale.to(states.dtype).masked_fill(scale == 0, 1.0)).clamp(-limit, limit)
    numbers = steps.round().to(torch.int8) if cache_dtype == "int8" else steps.to(torch.float8_e4m3fn).view(stored)
    return torch.cat([numbers, scale.view(stored)], dim=-1)


def decode(states: Tensor, dtype: torch.dtype) -> Tensor:
    """`(..., D + 2)` in bytes to `(..., D)` in `dtype`; floats as they are."""
    if not is_encoded(states):
        return states
    numbers, scale = states[..., :-SCALE_BYTES], states[..., -SCALE_BYTES:]
    if states.dtype == torch.uint8:
        numbers = numbers.view(torch.float8_e4m3fn)
    return numbers.to(dtype) * scale.contiguous().view(torch.bfloat16).to(dtype)


def most_off(states: Tensor, cache_dtype: str) -> Tensor:
    """By how much `decode` of `encode` may differ from `(..., D)` in floats: half a step, and the rounding of x."""
    exact = states.double().abs()
    scale = exact.amax(-1, keepdim=True) / LARGEST[cache_dtype] * (1 + 2.0**-8)
    half = scale / 2 if cache_dtype == "int8" else (exact / 16).maximum(scale / 1024)
    return half + exact.amax(-1, keepdim=True) * torch.finfo(states.dtype).eps


def width(states: Tensor) -> int:
    """D, of either form."""
    return states.shape[-1] - (SCALE_BYTES if is_encoded(states) else 0)


def blocks(states: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Parts of `(B, H, K, ...)` along K, and where they are; only one of them is decoded at a time."""
    for start in range(0, states.shape[2], BLOCK):
        part = slice(start, min(start + BLOCK, states.shape[2]))
        yield part, decode(states[:, :, part], dtype)
