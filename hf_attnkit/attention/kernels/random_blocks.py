"""BigBird's random blocks (Zaheer et al. 2020, arXiv 2007.14062): which blocks of keys a block of queries sees.

A block draws from the other blocks of its row, or in causal attention from those before it, by the
row's own number of blocks: padding does not change the draw, and the causal pattern of a prefix
does not change as the sequence grows, so that decoding step by step sees what one pass sees.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class Links:
    """Which blocks of keys each block of queries sees.

    Attributes:
        start: `(B,)` index of each row's first token, where its first block begins.
        blocks: `(B, num_blocks, number)` numbers of blocks; -1 where there is none.
        block_size: tokens in a block.
    """

    start: Tensor
    blocks: Tensor
    block_size: int


def find_links(mask: Mask, shape: torch.Size, number: int, block_size: int, seed: int) -> Links:
    """Draw the blocks of rows that are one document each.

    Args:
        mask: without a matrix.
        shape: of the keys, `(B, num_key_value_heads, K, head_dim)`.
        number: blocks of keys for each block of queries.
    """
    batch, kv_length = shape[0], shape[2]
    start = (mask.first_token() - mask.key_position[:, :1]).expand(batch, -1)[:, 0]
    if mask.key_visible is None:
        lengths = torch.full((batch,), kv_length, device=start.device)
    else:
        lengths = kv_length - mask.key_visible.flip(-1).int().argmax(-1).expand(batch) - start
    num_blocks = -(-kv_length // block_size)
    return Links(start, chosen_blocks(lengths, num_blocks, number, seed, mask.is_causal, block_size), block_size)


def linked_keys(mask: Mask, shape: torch.Size, number: int, block_size: int, seed: int) -> Tensor:
    """The keys that each query sees by a block, bool `(B, Q, K)`; each document of a packed row has its own blocks.

    Args:
        mask: any; a matrix tells the documents.
        shape, number: as `find_links`.
    """
    batch, kv_length = shape[0], shape[2]
    start = mask.key_position[:, :1]
    place = mask.key_position - mask.first_tokens().expand(batch, -1)  # among the tokens of its document
    visible = mask.key_visible if mask.dense is None else mask.dense.any(1).any(-2)
    visible = torch.ones_like(place, dtype=torch.bool) if visible is None else visible.expand(batch, -1)
    document = ((visible & (place == 0)).cumsum(-1) - 1).clamp(min=0)
    count = 1 if mask.dense is None else int(document.amax()) + 1
    lengths = place.new_zeros(batch, count).scatter_reduce(1, document, (place + 1).where(visible, 0), "amax")
    num_blocks = -(-kv_length // block_size)
    blocks = chosen_blocks(lengths.flatten(), num_blocks, number, seed, mask.is_causal, block_size)
    linked = torch.zeros(len(blocks), num_blocks, num_blocks + 1, dtype=torch.bool, device=blocks.device)
    linked = linked.scatter(2, blocks.where(blocks >= 0, num_blocks), True)[:, :, :-1]
    query = (mask.query_position - start).expand(batch, -1).clamp(0, kv_length - 1)  # its index among the keys
    own = document.gather(1, query)
    block = place.clamp(min=0) // block_size
    rows = torch.arange(batch, device=own.device)[:, None] * count + own
    of_query = linked[rows, block.gather(1, query)]  # (B, Q, blocks)
    seen = of_query.gather(2, block[:, None].expand(-1, of_query.shape[1], -1))
    return seen & (place >= 0)[:, None] & (own[:, :, None] == document[:, None])


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
