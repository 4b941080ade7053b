"""BigBird's random blocks (Zaheer et al. 2020, arXiv 2007.14062): which blocks of keys a block of queries sees.

A block draws from the other blocks of its row, or in causal attention from those before it, by the
row's own number of blocks: padding does not change the draw, and the causal pattern of a prefix
does not change as the sequence grows, so that decoding step by step sees what one pass sees.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def _draw(num_blocks: int, per_block: int, seed: int, is_causal: bool) -> Tensor:
    """`(num_blocks, per_block)`: blocks of keys for each block of queries, -1 where there are too few."""
    chosen = torch.full((num_blocks, per_block), -1)
    for block in range(num_blocks):
        others = block if is_causal else num_blocks - 1
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        drawn = torch.randperm(others, generator=generator)[:per_block]
        chosen[block, : len(drawn)] = drawn + (drawn >= block)
    return chosen


@torch.library.custom_op("hf_attnkit::chosen_blocks", mutates_args=())
def chosen_blocks(
    lengths: Tensor, num_blocks: int, per_block: int, seed: int, is_causal: bool, block_size: int
) -> Tensor:
    """Blocks of keys per block of queries; an operator, because torch.compile knows no generators.

    Args:
        lengths: `(B,)` tokens of each row.
        num_blocks: blocks of the longest row.

    Returns:
        `(B, num_blocks, per_block)` block numbers; -1 where there is none.
    """
    rows = torch.full((len(lengths), num_blocks, per_block), -1)
    for row, length in enumerate(lengths.tolist()):
        blocks = num_blocks if is_causal else -(-length // block_size)
        rows[row, :blocks] = _draw(blocks, per_block, seed, is_causal)
    return rows.to(lengths.device)


@chosen_blocks.register_fake
def _(lengths: Tensor, num_blocks: int, per_block: int, *_: int) -> Tensor:
    return lengths.new_empty(len(lengths), num_blocks, per_block)
