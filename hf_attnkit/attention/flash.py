"""Flash attention (Dao et al. 2022, arXiv 2205.14135; Milakov and Gimelshein 2018), in plain PyTorch.

Tiles of queries meet tiles of keys. Each row keeps a running maximum m, a running sum l and a
running output; a new tile of scores s rescales what was there:

    m' = max(m, max s)      l' = l e^(m - m') + sum e^(s - m')      o' = o e^(m - m') + e^(s - m') V

No score matrix is stored: the backward pass computes the tiles again from Q, K and the saved
log-sum-exp, so memory is linear in the sequence length. Tiles in the future of a causal query are
skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mask import Mask

QUERY_TILE = 256
KEY_TILE = 512


def check(num_heads: int, num_key_value_heads: int) -> None:
    """Any number of heads is fine."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `mha.attention`; returns no weights; sums in float32 or better.

    Raises:
        ValueError: if the mask is a bias that requires a gradient, which this kernel does not give.
    """
    if mask.bias is not None and mask.bias.requires_grad:
        raise ValueError("'flash' gives no gradient for a learned attention bias; use 'mha' or 'gqa' for this model")
    # One number from the global generator fixes every tile's dropout, so that the backward pass,
    # and gradient checkpointing's second forward, drop the same weights.
    seed = int(torch.randint(2**31, ())) if dropout > 0 else 0
    return _Flash.apply(query, key, value, mask, scaling, dropout, seed), None


def _tiles(mask: Mask) -> Iterator[tuple[slice, list[slice]]]:
    """Each tile of queries with the tiles of keys that it may see."""
    q_length, kv_length = mask.query_position.shape[1], mask.key_position.shape[1]
    skip = mask.is_causal and mask.dense is None
    offset = mask.offset() if skip else 0
    for start in range(0, q_length, QUERY_TILE):
        stop = min(start + QUERY_TILE, q_length)
        end = min(kv_length, offset + stop) if skip else kv_length
        yield slice(start, stop), [slice(k, min(k + KEY_TILE, end)) for k in range(0, end, KEY_TILE)]


def _stack(tensor: Tensor, num_groups: int) -> Tensor:
    """`"b (n g) q d -> b n (g q) d"`: the heads of a group as one tall matrix."""
    return tensor.reshape(tensor.shape[0], num_groups, -1, tensor.shape[-1])


def _scores(query: Tensor, key: Tensor, mask: Mask, queries: slice, keys: slice) -> Tensor:
    """Masked scaled scores `(batch, num_heads, q, k)` of a tile, float32 or better; `query` is scaled."""
    scores = _stack(query, key.shape[1]) @ key.transpose(-1, -2)
    scores = scores.view(*query.shape[:3], key.shape[2])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if mask.bias is not None:
        scores = scores + mask.bias[..., queries if mask.bias.shape[-2] > 1 else slice(None), keys]
    visible = mask.visible(queries, keys)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _kept(shape: torch.Size, dropout: float, seed: int, queries: slice, keys: slice, device: torch.device) -> Tensor:
    """Dropout factors of a tile: 0, or 1 / (1 - dropout)."""
    generator = torch.Generator(device=device)
    generator.manual_seed(seed * 2_147_483_647 + queries.start * 1_000_003 + keys.start)
    kept = torch.empty(shape, device=device).bernoulli_(1 - dropout, generator=generator)
    return kept / (1 - dropout)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scaling, dropout, seed):  # type: ignore[no-untyped-def]
        num_groups = key.shape[1]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        logsumexp = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        for queries, key_tiles in _tiles(mask):
            q = query[:, :, queries] * scaling
            top = q.new_full((*q.shape[:3], 1), -torch.inf, dtype=dtype)
            total = torch.zeros_like(top)
            result = q.new_zeros((*q.shape[:3], value.shape[-1]), dtype=dtype)
            for keys in key_tiles:
                scores = _scores(q, key[:, :, keys], mask, queries, keys)
                new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                # A row that has seen no key yet keeps -inf; 0 in its place avoids inf - inf.
                base = new_top.masked_fill(new_top == -torch.inf, 0.0)
                weights = torch.exp(scores - base)
                decay = torch.exp(top - base)
                total = total * decay + weights.sum(-1, keepdim=True)
                if dropout > 0:
                    weights = weights * _kept(weights.shape, dropout, seed, queries, keys, query.device)
                tile = _stack(weights.to(value.dtype), num_groups) @ value[:, :, keys]
                result = result * decay + tile.view(result.shape)
                top = new_top
            seen = total > 0
            output[:, :, queries] = torch.where(seen, result / total, 0.0).to(output.dtype)
            logsumexp[:, :, queries] = torch.where(seen, top + total.log(), -torch.inf).squeeze(-1)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.mask, ctx.scaling, ctx.dropout, ctx.seed = mask, scaling, dropout, seed
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        query, key, value, output, logsumexp = ctx.saved_tensors
        num_groups, dtype = key.shape[1], logsumexp.dtype
        grad_query, grad_key, grad_value = (torch.zeros_like(t, dtype=dtype) for t in (query, key, value))
        # d softmax: ds = p * (dp - delta) with delta = sum_j p_j dp_j = grad_output . output
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
        for queries, key_tiles in _tiles(ctx.mask):
            q = query[:, :, queries] * ctx.scaling
            gradient = grad_output[:, :, queries]
            # Rows that see nothing have weights e^(-inf - 0) = 0.
            lse = logsumexp[:, :, queries, None]
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
            for keys in key_tiles:
                k, v = key[:, :, keys], value[:, :, keys]
                weights = torch.exp(_scores(q, k, ctx.mask, queries, keys) - lse)
                d_weights = (_stack(gradient, num_groups) @ v.transpose(-1, -2)).view(weights.shape).to(dtype)
                dropped = weights
                if ctx.dropout > 0:
                    kept = _kept(weights.shape, ctx.dropout, ctx.seed, queries, keys, query.device)
                    dropped, d_weights = weights * kept, d_weights * kept
                d_scores = (weights * (d_weights - delta[:, :, queries])).to(query.dtype)
                tall = _stack(d_scores, num_groups)
                grad_value[:, :, keys] += _stack(dropped.to(value.dtype), num_groups).transpose(-1, -2) @ _stack(
                    gradient, num_groups
                )
                grad_key[:, :, keys] += tall.transpose(-1, -2) @ _stack(q, num_groups)
                grad_query[:, :, queries] += (tall @ k).view(q.shape) * ctx.scaling
        grads = (grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype))
        return *grads, None, None, None, None
