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

    def matrix(self, query_index: Tensor, kv_length: int) -> Tensor:
        """The keys that each query sees by a block, bool `(B, 1, Q, K)`.

        Args:
            query_index: `(B, Q)`, of each query among the keys.
        """
        start, blocks = self.start, self.blocks
        linked = torch.zeros(len(start), blocks.shape[1], blocks.shape[1] + 1, dtype=torch.bool, device=blocks.device)
        linked = linked.scatter(2, blocks.where(blocks >= 0, blocks.shape[1]), True)[:, :, :-1]
        query_block = (query_index - start[:, None]).clamp(min=0) // self.block_size
        key_index = torch.arange(kv_length, device=start.device) - start[:, None]
        of_query = linked.gather(1, query_block[:, :, None].expand(-1, -1, linked.shape[2]))
        of_key = (key_index.clamp(min=0) // self.block_size)[:, None].expand(-1, of_query.shape[1], -1)
        return (of_query.gather(2, of_key) & (key_index >= 0)[:, None])[:, None]


def find_links(mask: Mask, shape: torch.Size, number: int, block_size: int, seed: int) -> Links:
    """Draw the blocks.

    Args:
        shape: of the keys, `(B, num_key_value_heads, K, head_dim)`.
        number: blocks of keys for each block of queries.
    """
    batch, kv_length = shape[0], shape[2]
    start = (mask.first_token() - mask.key_position[:, :1]).expand(batch, -1)[:, 0]
    visible = mask.key_visible if mask.dense is None else mask.dense.any(-2)[:, 0]
    if visible is None:
        lengths = torch.full((batch,), kv_length, device=start.device)
    else:
        lengths = kv_length - visible.flip(-1).int().argmax(-1).expand(batch) - start
    num_blocks = -(-kv_length // block_size)
    return Links(start, chosen_blocks(lengths, num_blocks, number, seed, mask.is_causal, block_size), block_size)


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
