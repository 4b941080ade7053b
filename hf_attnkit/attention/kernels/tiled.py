"""The kernel of `flash`, `sliding_window` and `local_global`: tiles of an attention pattern, in plain PyTorch.

Flash attention (Dao et al. 2022, arXiv 2205.14135; Milakov and Gimelshein 2018) over the tiles that
a pattern has; what lies outside is never computed, forward or backward:

    window, causal          window, both ways        extra keys (global tokens, random blocks)
    q0 #                    q0 # #                   q0 # g
    q1 # #                  q1 # # #                 q1 # # g r
    q2   # #                q2   # # #               q2   # # g r
    q3     # #              q3     # #               q3     # # g r

Tiles of queries meet tiles of keys. Each row keeps a running maximum m, a running sum l and a
running output; a new tile of scores s rescales what was there:

    m' = max(m, max s)      l' = l e^(m - m') + sum e^(s - m')      o' = o e^(m - m') + e^(s - m') V

No score matrix is stored: the backward pass computes the tiles again from Q, K and the saved
log-sum-exp, so memory is linear in the sequence length. Forward and backward are two custom
operators, which torch.compile takes as they are instead of unrolling their loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.eight_bits import decode, width
from hf_attnkit.attention.kernels.tiles import Extra, Problem, make_problem, stack_groups
from hf_attnkit.attention.mask import Mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    extra: Extra | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over the tiles of a pattern; differentiable in both results.

    Args:
        query: `(B, num_heads, Q, head_dim)`.
        key, value: `(B, num_key_value_heads, K, head_dim)`; or in 8 bits, see `eight_bits`, without a gradient.
        mask: what may be seen besides; its keys must be at consecutive positions. Its `bias` gets a gradient.
        scaling: factor of the scores.
        dropout: probability of dropping a weight; the log-sum-exp is that before dropout.
        window: keys on each side of a query, its own included; all if `None`. Not together with `mask.dense`.
        extra: keys outside the window; not together with `mask.bias` or `mask.dense`.

    Returns:
        The output `(B, num_heads, Q, head_dim)`, and the log-sum-exp of the scaled scores
        `(B, num_heads, Q)` in float32 or better. A query that sees no key has output 0 and -inf.

    Raises:
        ValueError: for combinations that the arguments above exclude.
    """
    if window is not None and mask.dense is not None:
        raise ValueError("the tiled kernel takes a window or a full matrix; join them with mask.also(...)")
    if extra is not None and (window is None or mask.dense is not None or mask.bias is not None):
        raise ValueError("extra keys need a window, and neither a full matrix nor a bias")
    # One number from the global generator fixes every tile's dropout, so that the backward pass,
    # and gradient checkpointing's second forward, drop the same weights.
    seed = torch.randint(2**31, ()) if dropout > 0 else None
    offset = None if mask.known_offset is not None else mask.query_position[0, 0] - mask.key_position[0, 0]
    extras = (None, None, None, None, mask.document, 0)
    if extra is not None and extra.key.shape[3] > 0:
        extras = (extra.key, extra.value, extra.index, extra.visible, mask.document, extra.tile)  # type: ignore[assignment]
    output, logsumexp = tiled_attention(
        query, key, value, mask.key_visible, mask.dense, mask.bias, offset, *extras,
        mask.is_causal, window or 0, scaling, dropout, seed,
    )  # fmt: skip
    return output, logsumexp


def kept_weights(scores: Tensor, dropout: float, seed: int, queries: slice, start: int) -> Tensor:
    """Dropout factors of a tile: 0, or 1 / (1 - dropout). `start` tells the tiles of a row apart."""
    generator = torch.Generator(device=scores.device)
    generator.manual_seed(seed * 2_147_483_647 + queries.start * 1_000_003 + start)
    kept = torch.empty_like(scores, dtype=torch.float32).bernoulli_(1 - dropout, generator=generator)
    return kept.div_(1 - dropout)


@torch.library.custom_op("hf_attnkit::tiled_attention", mutates_args=())
def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_visible: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_index: Tensor | None,
    extra_visible: Tensor | None,
    document: Tensor | None,
    extra_tile: int,
    is_causal: bool,
    window: int,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, see `attend`. Without `offset` the last query is at the last key."""
    problem = make_problem(query, key, value, key_visible, dense, bias, offset, extra_key, extra_value, extra_index,
                       extra_visible, document, extra_tile, is_causal, window)  # fmt: skip
    number = 0 if seed is None else int(seed)
    dtype = _sums(query)
    output = query.new_zeros(*query.shape[:3], width(value))
    logsumexp = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    for queries in problem.query_tiles():
        q = query[:, :, queries] * scaling
        state: tuple[Tensor, Tensor, Tensor] | None = None  # running maximum, sum and output
        for scores, values, start in _forward_tiles(problem, q, queries):
            new_top = scores.amax(-1, keepdim=True)
            new_top = new_top if state is None else torch.maximum(state[0], new_top)
            # A row that has seen no key yet keeps -inf; 0 in its place avoids inf - inf.
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)
            weights = scores.sub_(base).exp_()
            sums = weights.sum(-1, keepdim=True)
            if dropout > 0:
                weights = weights.mul_(kept_weights(weights, dropout, number, queries, start))
            tile = (stack_groups(weights.to(values.dtype), key.shape[1]) @ values).view(*q.shape[:3], -1).to(dtype)
            if state is not None:
                decay = torch.exp(state[0] - base)
                sums, tile = state[1] * decay + sums, state[2] * decay + tile
            state = new_top, sums, tile
        if state is not None:
            top, total, result = state
            seen = total > 0
            output[:, :, queries] = torch.where(seen, result / total, 0.0).to(output.dtype)
            logsumexp[:, :, queries] = torch.where(seen, top + total.log(), -torch.inf).squeeze(-1)
    return output, logsumexp


def _forward_tiles(problem: Problem, query: Tensor, queries: slice) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Scores, values and a number for each tile that a tile of queries sees."""
    for keys in problem.key_tiles(queries):
        yield problem.scores(query, queries, keys), decode(problem.value[:, :, keys], query.dtype), keys.start
    if problem.extra is not None:
        tile = problem.extra_tile(queries)
        values = decode(problem.extra.value[:, :, tile], query.dtype)
        yield problem.extra_scores(query, queries, tile), values, -1


def _backward_tiles(
    problem: Problem, query: Tensor, queries: slice
) -> Iterator[tuple[Tensor, slice | int, Tensor, Tensor]]:
    """Scores, place (keys, or the number of a tile of extra keys), keys and values of the same tiles."""
    for keys in problem.key_tiles(queries):
        yield problem.scores(query, queries, keys), keys, problem.key[:, :, keys], problem.value[:, :, keys]
    if (extra := problem.extra) is not None:
        tile = problem.extra_tile(queries)
        yield problem.extra_scores(query, queries, tile), tile, extra.key[:, :, tile], extra.value[:, :, tile]


@torch.library.custom_op("hf_attnkit::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_visible: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_index: Tensor | None,
    extra_visible: Tensor | None,
    document: Tensor | None,
    extra_tile: int,
    is_causal: bool,
    window: int,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias, extra key and extra value; empty where there is none."""
    problem = make_problem(query, key, value, key_visible, dense, bias, offset, extra_key, extra_value, extra_index,
                       extra_visible, document, extra_tile, is_causal, window)  # fmt: skip
    number = 0 if seed is None else int(seed)
    dtype, num_groups = _sums(query), key.shape[1]
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(t, dtype=dtype) for t in (key, value))
    grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and bias_gradient else query.new_empty(0)
    extras = [query.new_empty(0) if t is None else torch.zeros_like(t, dtype=dtype) for t in (extra_key, extra_value)]
    # d softmax: ds = p * (dp - delta) with delta = sum_j p_j dp_j = grad_output . output; the
    # log-sum-exp adds p * grad_logsumexp.
    delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True) - grad_logsumexp[..., None]
    # Rows that see nothing have weights e^(-inf - 0) = 0.
    base = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)[..., None]
    for queries in problem.query_tiles():
        q, gradient = query[:, :, queries] * scaling, stack_groups(grad_output[:, :, queries], num_groups)
        tall_query = stack_groups(q, num_groups)
        sum_query = torch.zeros_like(q, dtype=dtype)
        for scores, where, k, v in _backward_tiles(problem, q, queries):
            weights = scores.sub_(base[:, :, queries]).exp_()
            d_weights = (gradient @ v.transpose(-1, -2)).view(weights.shape).to(dtype)
            dropped = weights
            if dropout > 0:
                kept = kept_weights(weights, dropout, number, queries, where.start if isinstance(where, slice) else -1)
                dropped, d_weights = weights * kept, d_weights.mul_(kept)
            d_scores = d_weights.sub_(delta[:, :, queries]).mul_(weights)
            tall = stack_groups(d_scores.to(query.dtype), num_groups)
            d_value = stack_groups(dropped.to(value.dtype), num_groups).transpose(-1, -2) @ gradient
            d_key = tall.transpose(-1, -2) @ tall_query
            sum_query += (tall @ k).view(q.shape)
            if isinstance(where, int):
                extras[0][:, :, where] += d_key
                extras[1][:, :, where] += d_value
                continue
            grad_key[:, :, where] += d_key
            grad_value[:, :, where] += d_value
            if bias is not None and bias_gradient:
                rows = queries if bias.shape[-2] > 1 else slice(None)
                part = grad_bias[..., rows, where]
                part += d_scores.sum_to_size(part.shape)
        grad_query[:, :, queries] = (sum_query * scaling).to(query.dtype)
    cast = (
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        grad_bias.to(query.dtype if bias is None else bias.dtype),
    )
    return grad_query, *cast, extras[0].to(key.dtype), extras[1].to(value.dtype)


def _sums(tensor: Tensor) -> torch.dtype:
    """Sums are taken in float32 or better."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@tiled_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], width(value)), query.new_empty(query.shape[:3], dtype=_sums(query))


@tiled_attention_backward.register_fake
def _(
    grad_output: Tensor, grad_logsumexp: Tensor, output: Tensor, logsumexp: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    query, key, value, _, _, bias, _, extra_key, extra_value, *_, bias_gradient = arguments
    optional = (bias if bias_gradient else None, extra_key, extra_value)
    rest = [query.new_empty(0) if t is None else torch.empty_like(t) for t in optional]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *rest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, tile, is_causal, window, scaling, dropout, seed = inputs
    ctx.save_for_backward(*output, *tensors, seed)
    ctx.options = (tile, is_causal, window, scaling, dropout)
    ctx.bias_gradient = ctx.needs_input_grad[5]


def _backward(ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    output, logsumexp, *tensors, seed = ctx.saved_tensors
    grads = tiled_attention_backward(
        grad_output, grad_logsumexp, output, logsumexp, *tensors, *ctx.options, seed, ctx.bias_gradient
    )
    query, key, value, bias, extra_key, extra_value = grads
    present = [bias if ctx.bias_gradient else None, None]
    present += [None, None] if tensors[7] is None else [extra_key, extra_value]
    return query, key, value, None, None, *present, *[None] * 9


tiled_attention.register_autograd(_backward, setup_context=_setup_context)
