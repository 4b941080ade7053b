"""Tokens that every query sees whatever its window: attention sinks and global tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer, take
from hf_attnkit.attention.kernels import packed
from hf_attnkit.attention.kernels.tiles import Extra
from hf_attnkit.attention.mask import Mask


def first_keys(
    key: Tensor, value: Tensor, mask: Mask, number: int, cache: SequenceLayer | None
) -> tuple[Extra, Tensor, Tensor]:
    """The first `number` tokens of each row as extra keys, and the other keys and values.

    They are taken from `key` and `value`, or from the copies in front of them that a cache returned.
    """
    batch, start = key.shape[0], mask.key_position[:, :1]
    if cache is None or cache.sink_position is None or cache.sink_visible is None:
        index = (mask.first_token() + torch.arange(number, device=key.device) - start).expand(batch, -1)
        extra_key, extra_value = take(key, index), take(value, index)
        visible = _visible_at(index, key.shape[2], mask)
    else:
        copies = cache.num_sinks
        index, visible = cache.sink_position - start, cache.sink_visible
        (extra_key, key), (extra_value, value) = (t.split([copies, t.shape[2] - copies], dim=2) for t in (key, value))
        # A single new token lies in its own window; of several, later ones may need it as a sink.
        if mask.query_position.shape[1] > 1:
            visible = visible | _visible_at(index, key.shape[2], mask)
            extra_key, extra_value = take(key, index, extra_key), take(value, index, extra_value)
    return Extra(extra_key.unsqueeze(2), extra_value.unsqueeze(2), index[:, None], visible[:, None]), key, value


def _visible_at(index: Tensor, kv_length: int, mask: Mask) -> Tensor:
    visible = (index >= 0) & (index < kv_length)
    if mask.key_visible is None:
        return visible
    return visible & mask.key_visible.expand(index.shape[0], -1).gather(1, index.clamp(0, kv_length - 1))


def dense_with_extra(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    extra: Extra,
    *,
    window: int,
    scaling: float,
    dropout: float,
    turned: Tensor | None = None,
) -> Tensor:
    """Window and extra keys as one matrix: for few queries or keys, or any mask. Shapes as `tiled.attend`, T = 1.

    Args:
        turned: the queries that the extra keys meet, if others; not together with a bias.
    """
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    index = extra.index[:, 0, None, None, :]  # (B, 1, 1, E)
    far = mask.query_position[:, None, :, None] - (mask.key_position[:, None, None, :1] + index)
    far = (far if mask.is_causal else far.abs()) >= window
    near, visible = mask.distance().abs() < window, mask.visible()
    outside = (far & extra.visible[:, :, None, :]).expand(batch, 1, q_length, -1)
    inside = index.clamp(0, kv_length - 1)
    if mask.dense is not None:
        seen = mask.dense.expand(batch, -1, q_length, -1)
        outside = outside & seen.gather(-1, inside.expand(-1, seen.shape[1], q_length, -1))
    near = near if visible is None else near & visible
    allowed = torch.cat([outside, near.expand(*outside.shape[:3], kv_length)], dim=-1)
    bias = mask.bias
    if bias is not None:
        bias = bias.expand(batch, -1, q_length, -1)
        bias = torch.cat([bias.gather(-1, inside.expand(-1, bias.shape[1], q_length, -1)), bias], dim=-1)
    key = torch.cat([extra.key[:, :, 0], key], dim=2)
    value = torch.cat([extra.value[:, :, 0], value], dim=2)
    whole = dataclasses.replace(mask, dense=allowed, bias=bias, key_visible=None)
    return packed.attention(
        query, key, value, whole, scaling=scaling, dropout=dropout, turned=turned, num_turned=extra.key.shape[3]
    )[0]
