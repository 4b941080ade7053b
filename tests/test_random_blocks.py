"""The random blocks of `local_global`: how many, chosen by the seed, the same however a text is fed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention import local_global
from hf_attnkit.attention.mask import Mask

OPTIONS = {"window": 1, "num_global_tokens": 0, "num_random_blocks": 2, "block_size": 4, "seed": 5}


def pattern(length: int, *, is_causal: bool = False, key_visible: Tensor | None = None, **options: Any) -> Tensor:
    """`(batch, length, length)` bool, read off the kernel: equal scores and one-hot values."""
    batch = 1 if key_visible is None else key_visible.shape[0]
    query = torch.zeros(batch, 1, length, 1, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(batch, 1, -1, -1)
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=key_visible)
    output, _ = local_global.attention(query, query, value, mask, scaling=1.0, **(OPTIONS | options))
    return output[:, 0] > 0


def blocks(seen: Tensor, size: int = 4) -> Tensor:
    return seen.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(2).all(-1)


def test_each_block_draws_that_many_of_those_before_it() -> None:
    linked = blocks(pattern(40)[0]).tril(-1)
    assert linked.sum(1).tolist() == [min(2, block) for block in range(10)]


def test_links_hold_in_both_directions() -> None:
    seen = pattern(40)[0]
    assert torch.equal(seen, seen.T)
    assert torch.equal(pattern(40, is_causal=True)[0], seen.tril())


def test_seed_decides() -> None:
    assert torch.equal(pattern(40), pattern(40))
    assert not torch.equal(pattern(40), pattern(40, seed=6))


def test_a_longer_text_keeps_the_pattern_of_its_beginning() -> None:
    assert torch.equal(pattern(60)[:, :40, :40], pattern(40))


def test_left_padding_does_not_move_the_blocks() -> None:
    """A text gets the same pattern alone and beside a longer one in a left-padded batch."""
    seen = torch.ones(1, 46, dtype=torch.bool)
    seen[0, :6] = False
    assert torch.equal(pattern(46, is_causal=True, key_visible=seen)[:, 6:, 6:], pattern(40, is_causal=True))


def test_marked_tokens_are_global() -> None:
    """`global_attention_mask` marks tokens that see all and are seen by all, padding excepted."""
    marked = torch.zeros(1, 12, dtype=torch.long)
    marked[0, 7] = 1
    hidden = torch.ones(1, 12, dtype=torch.bool)
    hidden[0, 10:] = False
    seen = pattern(12, key_visible=hidden, num_random_blocks=0, global_attention_mask=marked)[0]
    expected = torch.eye(12, dtype=torch.bool)
    expected[7, :], expected[:, 7] = True, True
    assert torch.equal(seen, expected & hidden)
