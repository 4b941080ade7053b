"""The random blocks of `local_global`: how many, chosen by the seed, the same however a text is fed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.local_global import LocalGlobalAttention
from hf_attnkit.attention.mask import Mask

KIND = LocalGlobalAttention(window=1, num_global_tokens=0, num_random_blocks=2, block_size=4, seed=5)
each_direction = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def pattern(
    length: int,
    *,
    is_causal: bool = False,
    key_visible: Tensor | None = None,
    marks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`(batch, length, length)` bool, read off the kernel: equal scores and one-hot values."""
    batch = 1 if key_visible is None else key_visible.shape[0]
    query = torch.zeros(batch, 1, length, 1, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(batch, 1, -1, -1)
    mask = Mask.aligned(length, length, is_causal=is_causal, key_visible=key_visible)
    call = Call(arguments={} if marks is None else {"global_attention_mask": marks})
    output, _ = replace(KIND, **options).attention(query, query, value, mask, scaling=1.0, call=call)
    return output[:, 0] > 0


def blocks(seen: Tensor, size: int = 4) -> Tensor:
    """Which other blocks each block sees whole."""
    whole = seen.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(2).all(-1)
    return whole & ~torch.eye(len(whole), dtype=torch.bool)


def test_each_block_draws_that_many_others() -> None:
    assert blocks(pattern(40)[0]).sum(1).tolist() == [2] * 10
    assert blocks(pattern(8)[0]).sum(1).tolist() == [1, 1]


def test_causal_blocks_draw_from_those_before_them() -> None:
    linked = blocks(pattern(40, is_causal=True)[0])
    assert torch.equal(linked, linked.tril())
    assert linked.sum(1).tolist() == [min(2, block) for block in range(10)]


def test_every_other_block_is_drawn_sometimes() -> None:
    """200 seeds, two of four others: the chance that one pair is never drawn is 20 * 2^-200."""
    drawn = torch.stack([blocks(pattern(20, seed=seed)[0]) for seed in range(200)]).sum(0)
    others = ~torch.eye(5, dtype=torch.bool)
    # Binomial(200, 1/2): five standard deviations are 36.
    assert ((drawn[others] - 100).abs() <= 36).all()


@each_direction
def test_seed_decides(is_causal: bool) -> None:
    one = pattern(40, is_causal=is_causal)
    assert torch.equal(one, pattern(40, is_causal=is_causal))
    assert not torch.equal(one, pattern(40, is_causal=is_causal, seed=6))


def test_a_longer_text_keeps_the_causal_pattern_of_its_beginning() -> None:
    assert torch.equal(pattern(60, is_causal=True)[:, :40, :40], pattern(40, is_causal=True))


@each_direction
@pytest.mark.parametrize("length", [40, 38])
def test_padding_does_not_change_the_draw(length: int, is_causal: bool) -> None:
    """A text gets the same pattern alone, and padded on either side beside a longer one."""
    seen = torch.ones(3, 46, dtype=torch.bool)
    seen[0, : 46 - length] = False
    seen[1, length:] = False
    together, alone = pattern(46, is_causal=is_causal, key_visible=seen), pattern(length, is_causal=is_causal)[0]
    assert torch.equal(together[0, -length:, -length:], alone) and not together[0, :, :-length].any()
    assert torch.equal(together[1, :length, :length], alone) and not together[1, :, length:].any()
    assert torch.equal(together[2], pattern(46, is_causal=is_causal)[0])


def test_steps_see_what_one_pass_sees() -> None:
    whole = pattern(40, is_causal=True)[0]
    value = torch.eye(40, dtype=torch.float64)[None, None]
    for count in (1, 3, 17):
        query, key = (torch.zeros(1, 1, length, 1, dtype=torch.float64) for length in (count, 40))
        mask = Mask.receive(None, count, 40, is_causal=True, device=key.device)
        output, _ = KIND.attention(query, key, value, mask, scaling=1.0)
        assert torch.equal(output[0, 0] > 0, whole[-count:])


@each_direction
def test_marked_tokens_are_global(is_causal: bool) -> None:
    """`global_attention_mask` marks tokens that see all and are seen by all, padding excepted."""
    marked = torch.zeros(1, 12, dtype=torch.long)
    marked[0, [5, 7, 11]] = 1
    hidden = torch.ones(1, 12, dtype=torch.bool)
    hidden[0, 10:] = False
    seen = pattern(12, is_causal=is_causal, key_visible=hidden, num_random_blocks=0, marks=marked)[0]
    expected = torch.eye(12, dtype=torch.bool)
    expected[[5, 7], :], expected[:, [5, 7]] = True, True
    expected = expected.tril() if is_causal else expected
    assert torch.equal(seen, expected & hidden)


def test_marks_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_attention_mask has shape \(1, 9\) for 12 queries and 12 keys"):
        pattern(12, marks=torch.ones(1, 9))
