"""Local and global attention (Longformer, Beltagy et al. 2020; BigBird, Zaheer et al. 2020).

A query sees a window, every global token, and optionally a few random blocks; a global token sees
every key and is seen by every query (symmetric, so long as causality allows):

    window 2, 1 global token            * global   x window
    0 * * * * * *
    1 * x x
    2 * x x x
    3 *   x x x
    4 *     x x x
    5 *       x x

Global tokens are the first `num_global_tokens` tokens (after left padding), or those that the user marks by passing
`global_attention_mask` `(batch, keys)` to `model(...)`, as with Transformers' Longformer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gqa
from .mask import Mask

CALL_ARGUMENTS = ("global_attention_mask",)
SELF_ATTENTION_ONLY = True  # a window is a distance within one sequence


def check(
    num_heads: int,
    num_key_value_heads: int,
    *,
    window: int,
    num_global_tokens: int = 1,
    num_random_blocks: int = 0,
    block_size: int = 64,
    seed: int = 0,
) -> None:
    """Raises `ValueError` for an option that is no integer, or below its least value."""
    least = {"window": 1, "num_global_tokens": 0, "num_random_blocks": 0, "block_size": 1, "seed": 0}
    for name, value in zip(least, (window, num_global_tokens, num_random_blocks, block_size, seed), strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least[name]}")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int,
    num_global_tokens: int = 1,
    num_random_blocks: int = 0,
    block_size: int = 64,
    seed: int = 0,
    global_attention_mask: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `mha.attention`; returns no weights.

    Args:
        window: keys on each side of a query, its own included.
        num_global_tokens: how many of the first tokens are global.
        num_random_blocks: random blocks of keys for each block of queries.
        block_size: tokens in a random block.
        seed: chooses the random blocks; the same blocks in every layer that has the same seed.
        global_attention_mask: `(batch, keys)`, nonzero = global; replaces `num_global_tokens`.
    """
    distance = mask.distance()
    allowed = distance.abs() < window
    if global_attention_mask is None:
        end = _first_token(mask) + num_global_tokens
        allowed = allowed | (mask.key_position < end)[:, None, None, :]
        allowed = allowed | (mask.query_position < end)[:, None, :, None]
    else:
        if global_attention_mask.shape[-1] != key.shape[2] or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"global_attention_mask has shape {tuple(global_attention_mask.shape)} for {query.shape[2]} queries "
                f"and {key.shape[2]} keys; it marks each token of one whole pass, so with a cache use "
                "num_global_tokens instead"
            )
        marked = global_attention_mask.bool()
        allowed = allowed | marked[:, None, None, :] | marked[:, None, :, None]
    if num_random_blocks:
        first = _first_token(mask)
        query_block = (mask.query_position - first).clamp(min=0) // block_size
        key_block = (mask.key_position - first).clamp(min=0) // block_size
        chosen = _random_blocks(int(query_block.max()) + 1, num_random_blocks, seed).to(key.device)
        # Keys beyond the last query (empty cache slots) lie in no chosen block.
        inside = key_block.clamp(max=chosen.shape[1] - 1)
        linked = chosen[query_block[:, :, None], inside[:, None, :]] & (key_block < chosen.shape[1])[:, None, :]
        allowed = allowed | linked[:, None]
    return gqa.attention(query, key, value, mask.also(allowed), scaling=scaling, dropout=dropout)


def _first_token(mask: Mask) -> Tensor:
    """Position of the first key that is no padding, `(B, 1)`: with left padding it is not 0."""
    seen = mask.key_visible
    if mask.dense is not None:
        if mask.query_position.shape[1] != mask.key_position.shape[1]:
            raise ValueError(
                "'local_global' with a cache cannot tell padding from a full attention matrix; it needs the model's "
                "own 2-D mask: set config.sliding_window to None, or pass a 2-D attention_mask"
            )
        seen = mask.dense.any(-2)[:, 0]
    if seen is None:
        return mask.key_position[:, :1]
    return mask.key_position.expand(seen.shape[0], -1).gather(1, seen.int().argmax(-1, keepdim=True))


def _random_blocks(num_blocks: int, per_block: int, seed: int) -> Tensor:
    """`(num_blocks, num_blocks)` bool, True where block i attends to block j <= i or j attends to i.

    A block draws from those before it, by its own number alone, so the pattern of a prefix does not
    change as the sequence grows: decoding step by step sees what one pass sees. The links hold in
    both directions; a causal mask keeps the backward ones.
    """
    chosen = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for block in range(1, num_blocks):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        chosen[block, torch.randperm(block, generator=generator)[:per_block]] = True
    return chosen | chosen.T
