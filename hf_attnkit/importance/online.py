"""Entropy and largest weight of each query's attention, without the attention matrix.

For the scaled scores s_ij of query i over the keys that it may see, p_i = softmax(s_i) and

    H_i = -sum_j p_ij ln p_ij = logsumexp_j(s_ij) - sum_j p_ij s_ij        in nats, 0 ln 0 = 0

Two ways to it, both linear in the length:

- Any mask: one pass over tiles of scores with a running maximum m, as in online softmax (Milakov and Gimelshein 2018,
  arXiv 1805.02867), l = sum_j e^(s_ij - m) and w = sum_j e^(s_ij - m) (s_ij - m). Then H = ln l - w / l, and the
  largest weight is 1 / l. A bound of the scores (softcap) is applied to them tile by tile; a learned sink is a key that
  every query sees first, so m starts at its score, l at 1 and w at 0.
- Causal or not, with or without padding, on a CPU: sum_j p_ij s_ij = scaling * q_i . Attention(Q, K, V=K)_i, so one
  call of PyTorch's flash kernel, which also returns the log-sum-exp, gives H at the cost of one more attention.

The mean key is subtracted first. That shifts all scores of a query alike, which changes neither number, and keeps
them small: the two large terms of H would lose digits otherwise. Scores under a softcap or next to a sink stay where
they are, since a shift would change what these do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kernels.tiles import score_tiles
from hf_attnkit.attention.mask import Mask

# An operator that PyTorch keeps to itself; `_flash_agrees` looks whether it does what is expected of it.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@torch.no_grad()
def masked_entropy(query: Tensor, key: Tensor, mask: Mask, scaling: float, window: int | None = None) -> Tensor:
    """Entropy of each query's attention, `(B, num_heads, Q)` in nats, float32 or better; without gradient.

    Args:
        query: `(B, num_heads, Q, head_dim)`.
        key: `(B, num_key_value_heads, K, head_dim)`.
        window: keys on each side of a query, its own included; all if `None`. `mask` itself has no window.
    """
    entropies = []
    for queries, keys, shown in _groups(query, key, mask, window):
        if _flash_takes(queries, keys, shown, window):
            entropies.append(_flash_entropy(queries, keys, shown, scaling))
        else:
            total, weighted = _stream(queries, keys, shown, scaling, window)
            entropies.append(total.log() - weighted / total)
    single = visible_keys(mask, window) <= 1
    return torch.cat(entropies, dim=1).masked_fill(single, 0.0).clamp(min=0.0)


@torch.no_grad()
def largest_weight(query: Tensor, key: Tensor, mask: Mask, scaling: float, window: int | None = None) -> Tensor:
    """max_j p_ij of each query, `(B, num_heads, Q)`, in (0, 1], a sink's weight included; 0 for one that sees no key.

    Arguments as `masked_entropy`.
    """
    tops = [_stream(*group, scaling, window)[0].reciprocal() for group in _groups(query, key, mask, window)]
    return torch.cat(tops, dim=1).masked_fill(visible_keys(mask, window) == 0, 0.0)


def visible_keys(mask: Mask, window: int | None = None) -> Tensor:
    """How many keys each query sees, integer `(B, 1 or H, Q)`; B is 1 where all rows agree.

    A sink is one more for a query that sees a key of the sequence.
    """
    number = _visible(mask, window)
    return number if mask.sinks is None else number + (number > 0)


def _visible(mask: Mask, window: int | None) -> Tensor:
    if mask.dense is not None:
        mask = _within(mask, window)
        assert mask.dense is not None
        return mask.dense.sum(-1).expand(-1, -1, mask.query_position.shape[1])
    kv_length, device = mask.key_position.shape[1], mask.key_position.device
    q_length = mask.query_position.shape[1]
    reach = window or q_length + kv_length
    positions = torch.arange(q_length, device=device) + mask.offset()
    start = (positions - reach + 1).clamp(0, kv_length)
    stop = (positions + (1 if mask.is_causal else reach)).clamp(0, kv_length)
    if mask.key_visible is None:
        return (stop - start)[None, None]
    before = F.pad(mask.key_visible.cumsum(-1), (1, 0))
    return (before[:, stop] - before[:, start])[:, None]


def _groups(query: Tensor, key: Tensor, mask: Mask, window: int | None) -> Iterator[tuple[Tensor, Tensor, Mask]]:
    """Group by group: its queries, its one key head without the mean where that may go, and the mask.

    Copies are of one group at a time.
    """
    mask = _within(mask, window)
    dtype = torch.promote_types(query.dtype, torch.float32)
    size = query.shape[1] // key.shape[1]
    for group in range(key.shape[1]):
        heads = slice(group * size, (group + 1) * size)
        keys = key[:, group : group + 1].to(dtype)
        if mask.softcap is not None or mask.sinks is not None:
            mean = keys.new_zeros(())
        elif mask.key_visible is None:
            mean = keys.mean(2, keepdim=True)
        else:
            visible = mask.key_visible[:, None, :, None]
            mean = keys.masked_fill(~visible, 0.0).sum(2, keepdim=True) / visible.sum(2, keepdim=True).clamp(min=1)
        per_head = {
            name: tensor[:, heads]
            for name in ("dense", "bias")
            if (tensor := getattr(mask, name)) is not None and tensor.shape[1] > 1
        }
        if mask.sinks is not None:
            per_head["sinks"] = mask.sinks[heads]
        yield query[:, heads].to(dtype), keys - mean, dataclasses.replace(mask, **per_head)


def _within(mask: Mask, window: int | None) -> Mask:
    """A full matrix takes the window in; what has none keeps it apart, so that tiles outside can be skipped."""
    if mask.dense is None or window is None:
        return mask
    return mask.also(mask.distance().abs() < window)


def _stream(query: Tensor, key: Tensor, mask: Mask, scaling: float, window: int | None) -> tuple[Tensor, Tensor]:
    """l and w of the text above, each `(B, H, Q)`; a query that sees no key has l = 0, or 1 with a sink."""
    total = query.new_zeros(query.shape[:3])
    weighted, tiny = torch.zeros_like(total), torch.finfo(query.dtype).min
    window = window if mask.dense is None else None
    for queries, tiles in score_tiles(query, key, mask, scaling=scaling, window=window):
        top = query.new_full((*query.shape[:2], queries.stop - queries.start), -torch.inf)
        sums, weighted_sums = torch.zeros_like(top), torch.zeros_like(top)
        if mask.sinks is not None:
            top, sums = mask.sinks.to(top)[:, None].expand_as(top), torch.ones_like(top)
        for scores in tiles:
            new_top = torch.maximum(top, scores.amax(-1))
            # A row that has seen no key yet keeps -inf; 0 in its place avoids inf - inf.
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)
            shift = (top - base).clamp(min=tiny)
            scores = scores.sub_(base[..., None]).clamp_(min=tiny)
            weights = scores.exp()
            decay = shift.exp()
            weighted_sums = (weighted_sums + shift * sums) * decay + scores.mul_(weights).sum(-1)
            sums = sums * decay + weights.sum(-1)
            top = new_top
        total[..., queries], weighted[..., queries] = sums, weighted_sums
    return total, weighted


def _flash_takes(query: Tensor, key: Tensor, mask: Mask, window: int | None) -> bool:
    """Whether PyTorch's flash kernel for CPUs computes this and, tried once, computes it right."""
    plain = window is None and all(each is None for each in (mask.dense, mask.bias, mask.softcap, mask.sinks))
    aligned = not mask.is_causal or (query.shape[2] == key.shape[2] and mask.offset() == 0)
    return plain and aligned and query.device.type == "cpu" and _FLASH is not None and _flash_agrees(query.dtype)


def _flash_entropy(query: Tensor, key: Tensor, mask: Mask, scaling: float) -> Tensor:
    options: dict[str, Any] = {"is_causal": mask.is_causal, "scale": scaling}
    if mask.key_visible is not None:
        visible = mask.key_visible.expand(query.shape[0], -1)[:, None, None]
        options["attn_mask"] = query.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
    assert _FLASH is not None
    expected_key, logsumexp = _FLASH(query, key, key, **options)
    entropy: Tensor = logsumexp - scaling * expected_key.mul_(query).sum(-1)
    return entropy


@functools.cache
def _flash_agrees(dtype: torch.dtype) -> bool:
    """One small problem with causality, padding and a group of heads, by the kernel and tile by tile."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 70, 8, generator=generator).to(dtype) for heads in (3, 1))
    visible = torch.arange(70) >= torch.tensor([[0], [9]])
    try:
        for is_causal in (False, True):
            mask = Mask.aligned(70, 70, is_causal=is_causal, key_visible=visible)
            total, weighted = _stream(query, key, mask, 1.0, None)
            error = (_flash_entropy(query, key, mask, 1.0) - (total.log() - weighted / total)).abs()
            # A query that sees no key has no entropy, and the kernel's number for it is not used.
            if not error.masked_fill(visible_keys(mask) == 0, 0.0).max() <= 256 * torch.finfo(dtype).eps:
                return False
    except (RuntimeError, TypeError):  # another signature, or a check that refuses
        return False
    return True
