"""Window, global tokens and random blocks, tile by tile: nothing outside the pattern is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.cache import take
from hf_attnkit.attention.kernels import tiled
from hf_attnkit.attention.kernels.random_blocks import Links
from hf_attnkit.attention.kernels.tiles import Extra
from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class Pattern:
    """Which keys the queries see.

    Attributes:
        window: number of keys on each side of a query, its own included.
        is_global: `(B, K)` bool.
        positions: `(B, G)` indices of the global tokens; rows with fewer repeat a token that is not global.
        links: the random blocks, or `None`.
    """

    window: int
    is_global: Tensor
    positions: Tensor
    links: Links | None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, pattern: Pattern, *, scaling: float, dropout: float
) -> Tensor:
    """Window and extra keys for all queries, then the rows of the global tokens, which see every key.

    Shapes as in `Kind.attention`, as many queries as keys; the mask has no matrix and no bias. Returns the output.
    """
    common: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
    positions = pattern.positions
    valid = pattern.is_global.gather(1, positions)
    if pattern.links is None:
        extra = Extra(take(key, positions)[:, :, None], take(value, positions)[:, :, None],
                      positions[:, None], valid[:, None])  # fmt: skip
        output = tiled.attend(query, key, value, mask, window=pattern.window, extra=extra, **common)[0]
    else:
        output = _with_random_blocks(query, key, value, mask, pattern, pattern.links, **common)
    if positions.shape[1] == 0:
        return output
    rows = take(query, positions)
    if mask.is_causal:
        past = positions[:, None, :, None] >= torch.arange(key.shape[2], device=key.device)
        seen = past if mask.key_visible is None else past & mask.key_visible[:, None, None, :]
        full = Mask(positions, mask.key_position, True, dense=seen)
    else:
        full = Mask(positions, mask.key_position, False, mask.key_visible)
    seen_all = tiled.attend(rows, key, value, full, **common)[0]
    index = positions[:, None, :, None].expand_as(seen_all)
    return output.scatter(2, index, torch.where(valid[:, None, :, None], seen_all, take(output, positions)))


def _with_random_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, pattern: Pattern, links: Links, **common: Any
) -> Tensor:
    """Rows are rotated so that their first tokens, and with them the blocks, are in line."""
    start, blocks, block_size = links.start, links.blocks, links.block_size
    length, device = key.shape[2], key.device
    steps = torch.arange(length, device=device)
    turn, back = (steps + start[:, None]) % length, (steps - start[:, None]) % length
    query, key, value = (take(t, turn) for t in (query, key, value))
    visible = mask.key_visible
    visible = torch.ones(1, length, dtype=torch.bool, device=device) if visible is None else visible
    visible = visible.expand(len(start), -1).gather(1, turn)
    is_global = pattern.is_global.gather(1, turn)
    index = blocks[..., None] * block_size + torch.arange(block_size, device=device)
    index = index.flatten(2)  # (B, blocks, number * block_size)
    inside = (index >= 0) & (index < length)
    flat = index.clamp(0, length - 1).flatten(1)
    usable = (visible & ~is_global).gather(1, flat).view_as(index) & inside
    globals_ = (pattern.positions - start[:, None]) % length
    number = blocks.shape[1]
    valid = is_global.gather(1, globals_)

    def tiles(states: Tensor) -> Tensor:
        random = take(states, flat).unflatten(2, (number, -1))
        return torch.cat([take(states, globals_)[:, :, None].expand(-1, -1, number, -1, -1), random], dim=3)

    extra = Extra(
        tiles(key),
        tiles(value),
        torch.cat([globals_[:, None].expand(-1, number, -1), index.clamp(0, length - 1)], dim=-1),
        torch.cat([valid[:, None].expand(-1, number, -1), usable], dim=-1),
        block_size,
    )
    turned = Mask.aligned(length, length, is_causal=mask.is_causal, key_visible=visible, device=device)
    output = tiled.attend(query, key, value, turned, window=pattern.window, extra=extra, **common)[0]
    return take(output, back)
