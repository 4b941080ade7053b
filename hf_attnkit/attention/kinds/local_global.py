"""Local and global attention (Longformer, Beltagy et al. 2020; BigBird, Zaheer et al. 2020), cost n * window.

A query sees a window, every global token, and optionally a few random blocks; a global token sees
every key and is seen by every query (symmetric, so long as causality allows):

    window 2, 1 global token            * global   x window
    0 * * * * * *
    1 * x x
    2 * x x x
    3 *   x x x
    4 *     x x x
    5 *       x x

Global tokens are the first `num_global_tokens` tokens (after left padding), or those that the user
marks by passing `global_attention_mask` `(batch, keys)` to `model(...)`, as with Transformers'
Longformer. Nothing outside the pattern is computed, forward or backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.cache import ALL_TOKENS, SequenceLayer, take, window_layer
from hf_attnkit.attention.kernels import packed, tiled
from hf_attnkit.attention.kernels.random_blocks import chosen_blocks
from hf_attnkit.attention.kernels.tiles import Extra
from hf_attnkit.attention.kinds import sliding_window
from hf_attnkit.attention.mask import Mask

CALL_ARGUMENTS = ("global_attention_mask",)
SELF_ATTENTION_ONLY = True


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


def create_cache(
    max_length: int | None,
    *,
    window: int,
    num_global_tokens: int = 1,
    num_random_blocks: int = 0,
    block_size: int = 64,
    seed: int = 0,
) -> SequenceLayer:
    """The cache layer of a causal model; it keeps all keys if random blocks may need any of them."""
    if num_random_blocks:
        return window_layer(max_length, ALL_TOKENS)
    return window_layer(max_length, window, num_global_tokens)


def seen(
    mask: Mask,
    shape: torch.Size,
    *,
    window: int,
    num_global_tokens: int = 1,
    num_random_blocks: int = 0,
    block_size: int = 64,
    seed: int = 0,
    global_attention_mask: Tensor | None = None,
) -> Mask:
    """The mask with the pattern in it, as a matrix.

    Args:
        shape: of the keys, `(B, num_key_value_heads, K, head_dim)`.
    """
    mask = mask.as_matrix()
    is_global, _ = _global_tokens(mask, num_global_tokens, global_attention_mask, shape)
    linked = _linked(mask, shape, num_random_blocks, block_size, seed) if num_random_blocks else None
    return mask.also(_allowed(mask, window, is_global, linked))


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
    cache: SequenceLayer | None = None,
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `mha.attention`; returns no weights.

    Args:
        window: keys on each side of a query, its own included.
        num_global_tokens: how many of the first tokens are global.
        num_random_blocks: random blocks of keys for each block of queries.
        block_size: tokens in a random block.
        seed: chooses the random blocks; the same blocks in every layer that has the same seed.
        global_attention_mask: `(batch, keys)`, nonzero = global; replaces `num_global_tokens`.
        cache: the layer that handed out `key` and `value`, if it was made by `create_cache`.

    Raises:
        ValueError: for a `global_attention_mask` of another size, or together with a cache.
    """
    common: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
    if global_attention_mask is not None:
        _check_marks(global_attention_mask, query, key, cache)
    elif mask.is_causal and num_random_blocks == 0:
        # A global query sees no more than the others here: all before it is global too.
        return sliding_window.attention(
            query, key, value, mask, window=window, num_sink_tokens=num_global_tokens, cache=cache, **common
        )
    is_global, positions = _global_tokens(mask, num_global_tokens, global_attention_mask, key.shape)
    if mask.dense is not None or mask.bias is not None or query.shape[2] != key.shape[2]:
        linked = _linked(mask, key.shape, num_random_blocks, block_size, seed) if num_random_blocks else None
        return packed.attention(query, key, value, mask.also(_allowed(mask, window, is_global, linked)), **common)
    links = _links(mask, key.shape, num_random_blocks, block_size, seed) if num_random_blocks else None
    return _sparse(query, key, value, mask, window, is_global, positions, links, block_size, scaling, dropout), None


def _check_marks(marks: Tensor, query: Tensor, key: Tensor, cache: SequenceLayer | None) -> None:
    dropped = cache is not None and int(cache.seen) != query.shape[2]
    if dropped or marks.shape[-1] != key.shape[2] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"global_attention_mask has shape {tuple(marks.shape)} for {query.shape[2]} queries and {key.shape[2]} "
            "keys; it marks each token of one whole pass, so with a cache use num_global_tokens instead"
        )


def _global_tokens(mask: Mask, number: int, marks: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """`(B, K)` bool, True = global, and `(B, G)` their indices; rows with fewer repeat a token that is not global."""
    batch, kv_length = shape[0], shape[2]
    if marks is None:
        first = mask.first_tokens()
        position = mask.key_position.expand(first.shape[0], -1)
        is_global = ((position >= first) & (position < first + number)).expand(batch, -1)
        count = min(number, kv_length)
    else:
        is_global = marks.bool().expand(batch, -1)
        count = int(is_global.sum(-1).max())
    if mask.key_visible is not None and mask.dense is None:
        is_global = is_global & mask.key_visible
    order = is_global.int().argsort(dim=-1, descending=True, stable=True)
    return is_global, order[:, :count]


def _links(mask: Mask, shape: torch.Size, number: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """`(B,)` index of each row's first token, and `(B, blocks, number)` the blocks that each block sees."""
    batch, kv_length = shape[0], shape[2]
    start = (mask.first_token() - mask.key_position[:, :1]).expand(batch, -1)[:, 0]
    if mask.key_visible is None:
        lengths = torch.full((batch,), kv_length, device=start.device)
    else:
        lengths = kv_length - mask.key_visible.flip(-1).int().argmax(-1).expand(batch) - start
    num_blocks = -(-kv_length // block_size)
    blocks = chosen_blocks(lengths, num_blocks, number, seed, mask.is_causal, block_size)
    return start, blocks


def _linked(mask: Mask, shape: torch.Size, number: int, block_size: int, seed: int) -> Tensor:
    """Which keys a query sees by random blocks, `(B, Q, K)`; each document of a packed row has blocks of its own."""
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


def _allowed(mask: Mask, window: int, is_global: Tensor, linked: Tensor | None) -> Tensor:
    """The pattern as a matrix `(B, 1, Q, K)`: for a mask that is one already, or with a cache that keeps all keys."""
    batch, kv_length = is_global.shape
    index = (mask.query_position - mask.key_position[:, :1]).expand(batch, -1)  # of each query among the keys
    inside = index.clamp(0, kv_length - 1)
    allowed = (mask.distance().abs() < window) | is_global[:, None, None, :]
    allowed = allowed | is_global.gather(1, inside)[:, None, :, None]
    return allowed if linked is None else allowed | linked[:, None]


def _sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    window: int,
    is_global: Tensor,
    positions: Tensor,
    links: tuple[Tensor, Tensor] | None,
    block_size: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """The pattern block by block: window and extra keys for all queries, then the rows of the global ones."""
    common: dict[str, Any] = {"scaling": scaling, "dropout": dropout}
    valid = is_global.gather(1, positions)
    if links is None:
        extra = Extra(take(key, positions)[:, :, None], take(value, positions)[:, :, None],
                      positions[:, None], valid[:, None])  # fmt: skip
        output = tiled.attend(query, key, value, mask, window=window, extra=extra, **common)[0]
    else:
        output = _with_random_blocks(
            query, key, value, mask, window, is_global, positions, links, block_size, scaling, dropout
        )
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    window: int,
    is_global: Tensor,
    positions: Tensor,
    links: tuple[Tensor, Tensor],
    block_size: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Rows are rotated so that their first tokens, and with them the blocks, stand in line."""
    start, blocks = links
    length, device = key.shape[2], key.device
    steps = torch.arange(length, device=device)
    turn, back = (steps + start[:, None]) % length, (steps - start[:, None]) % length
    query, key, value = (take(t, turn) for t in (query, key, value))
    visible = mask.key_visible
    visible = torch.ones(1, length, dtype=torch.bool, device=device) if visible is None else visible
    visible = visible.expand(len(start), -1).gather(1, turn)
    is_global = is_global.gather(1, turn)
    index = blocks[..., None] * block_size + torch.arange(block_size, device=device)
    index = index.flatten(2)  # (B, blocks, number * block_size)
    inside = (index >= 0) & (index < length)
    flat = index.clamp(0, length - 1).flatten(1)
    usable = (visible & ~is_global).gather(1, flat).view_as(index) & inside
    globals_ = (positions - start[:, None]) % length
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
    output = tiled.attend(query, key, value, turned, scaling=scaling, dropout=dropout, window=window, extra=extra)[0]
    return take(output, back)
