"""Fit a layer's query projection so that it attends as the untouched model does, after its keys changed.

With p_i the untouched model's attention of query i, k_j the changed keys, x_i the layer's input and R_i the rotary
embedding,

    W = argmin  sum_i KL(p_i || softmax_j(scaling * R_i W x_i . k_j))

for each query head by itself: a multinomial logistic regression, so convex in W. A few steps of conjugate gradients
(Polak and Ribiere 1969), each with a Newton step along its line, preconditioned by the Kronecker factors of the
curvature as in K-FAC (Martens and Grosse 2015, arXiv 1503.05671):

    d^2 KL / dW^2  ~  E[R_i^T Cov_{j ~ p_i}(scaling k_j) R_i]  (x)  E[x x^T]

the first of one key drawn for each query. What is returned is the best W met, so it is never worse than the first.
A key's own projection stays: the first token of a text, which draws much attention, would dominate its fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention.mask import Mask
from .families import Rope

STEPS = 6
# Shares of the factors' mean diagonals that are added to them, so that directions never seen stay as they are.
DAMPING = (0.3, 0.03)
# Numbers of one block of scores, 64 MiB in float32.
BLOCK = 2**24


@dataclass(frozen=True)
class Batch:
    """What a layer sees in one batch. B sequences, T tokens, H query heads of size d, G key heads.

    Attributes:
        inputs: `(B, T, m)`, of the query projection; with a 1 appended where that has a bias.
        key: `(B, G, T, d)`, the changed keys, as they enter the scores.
        target_query, target_key: `(B, H, T, d)` and `(B, G', T, d)`, those of the untouched model.
        mask: which keys are seen.
        real: `(B, T)` bool, False for padding.
        rotation: complex `(B or 1, T, pairs)`, what the rotary embedding multiplies each pair by; `None` without.
    """

    inputs: Tensor
    key: Tensor
    target_query: Tensor
    target_key: Tensor
    mask: Mask
    scaling: float
    real: Tensor
    rope: Rope | None = None
    rotation: Tensor | None = None

    def rotate(self, query: Tensor, *, back: bool = False) -> Tensor:
        """R_t for each token of `(B, H, T, d)`, or its transpose."""
        if self.rope is None or self.rotation is None:
            return query
        first, second = self.rope.pairs()
        factor = self.rotation[:, None].conj() if back else self.rotation[:, None]
        turned = torch.complex(query[..., first], query[..., second]) * factor
        rotated = query.clone()
        rotated[..., first], rotated[..., second] = turned.real, turned.imag
        return rotated

    def blocks(self) -> Iterator[slice]:
        """Queries whose scores fit into memory together."""
        batch, num_heads, length, _ = self.target_query.shape
        size = max(BLOCK // (batch * num_heads * length), 1)
        return (slice(start, start + size) for start in range(0, length, size))

    def log_attention(self, query: Tensor, key: Tensor, queries: slice) -> Tensor:
        """`(B, H, q, T)` for these queries."""
        scores = grouped(query[:, :, queries], key) * self.scaling
        if self.mask.bias is not None:
            scores = scores + self.mask.bias[..., queries if self.mask.bias.shape[-2] > 1 else slice(None), :]
        visible = self.mask.visible(queries)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        return scores.log_softmax(-1)


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """`(B, H, q, T)` products of `(B, H, q, d)` with `(B, G, T, d)`, H / G heads for each key head."""
    batch, num_heads, length, size = query.shape
    stacked = query.reshape(batch, key.shape[1], -1, size)
    return (stacked @ key.mT).view(batch, num_heads, length, -1)


def mixed(weights: Tensor, key: Tensor) -> Tensor:
    """`(B, H, q, d)`, keys `(B, G, T, d)` weighted by `(B, H, q, T)`."""
    batch, num_heads, length, keys = weights.shape
    return (weights.reshape(batch, key.shape[1], -1, keys) @ key).view(batch, num_heads, length, -1)


def fit_queries(weight: Tensor, batches: Sequence[Batch], steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """The fitted projection, and what it gains.

    Args:
        weight: `(H, d, m)`, the present one, with its bias as the last column if inputs have a 1 appended.

    Returns:
        The new weight, and `(H,)` mean KL divergence per real query in nats before and after, lower is better.
    """
    factors = _factors(weight, batches)
    best, first = weight, None
    direction = length = least = gradient = scaled = weight.new_zeros(())
    for step in range(steps + 1):
        divergence, slope = _gradient(weight, batches)
        if first is None:
            first = least = divergence
            gradient, scaled = slope, _preconditioned(slope, factors)
            direction = scaled
        else:
            better = divergence < least
            whole = better[:, None, None]
            # Polak-Ribiere, restarted where it would go uphill; a head whose step failed tries a shorter one.
            conditioned = _preconditioned(slope, factors)
            beta = _dot(slope, conditioned - scaled) / _dot(gradient, scaled).clamp(min=1e-30)
            conjugate = conditioned + beta.clamp(min=0)[:, None, None] * direction
            conjugate = torch.where((_dot(slope, conjugate) > 0)[:, None, None], conjugate, conditioned)
            best, direction = torch.where(whole, weight, best), torch.where(whole, conjugate, direction)
            gradient, scaled = torch.where(whole, slope, gradient), torch.where(whole, conditioned, scaled)
            least, length = torch.where(better, divergence, least), torch.where(better, 0.0, length / 4)
        if step == steps:
            break
        curvature = _curvature(best, direction, batches)
        newton = torch.where(curvature > 0, _dot(gradient, direction) / curvature.clamp(min=1e-30), 0.0)
        length = torch.where(length > 0, length, newton)
        weight = best - length[:, None, None] * direction
    assert first is not None
    return best, first, least


def _query(weight: Tensor, batch: Batch) -> Tensor:
    """`(B, H, T, d)`, rotated."""
    return batch.rotate(torch.einsum("hdm,btm->bhtd", weight, batch.inputs))


def _gradient(weight: Tensor, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """`(H,)` mean divergence and its gradient `(H, d, m)`."""
    total, gradient = weight.new_zeros(len(weight)), torch.zeros_like(weight)
    for batch in batches:
        query, steps = _query(weight, batch), []
        for queries in batch.blocks():
            target = batch.log_attention(batch.target_query, batch.target_key, queries)
            found = batch.log_attention(query, batch.key, queries)
            real = batch.real[:, None, queries, None]
            probability = target.exp()
            # Hidden keys have probability 0 on both sides.
            total += ((target - found).masked_fill(probability == 0, 0.0) * probability * real).sum((0, 2, 3))
            steps.append(mixed((found.exp() - probability) * real, batch.key) * batch.scaling)
        gradient += torch.einsum("bhtd,btm->hdm", batch.rotate(torch.cat(steps, dim=2), back=True), batch.inputs)
    count = sum(batch.real.sum() for batch in batches)
    return total / count, gradient / count


def _curvature(weight: Tensor, direction: Tensor, batches: Sequence[Batch]) -> Tensor:
    """`(H,)` second derivative of the mean divergence along a direction: the mean variance of the scores' change."""
    total = weight.new_zeros(len(weight))
    for batch in batches:
        query, change = _query(weight, batch), _query(direction, batch)
        for queries in batch.blocks():
            probability = batch.log_attention(query, batch.key, queries).exp()
            scores = grouped(change[:, :, queries], batch.key) * batch.scaling
            centred = scores - (probability * scores).sum(-1, keepdim=True)
            total += (probability * centred.square() * batch.real[:, None, queries, None]).sum((0, 2, 3))
    return total / sum(batch.real.sum() for batch in batches)


Factors = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _factors(weight: Tensor, batches: Sequence[Batch]) -> Factors:
    """Damped eigenvalues and eigenvectors of the curvature's two factors, `(H, d, d)` and `(m, m)`."""
    keys = weight.new_zeros(*weight.shape[:2], weight.shape[1])
    moment = weight.new_zeros(2 * (weight.shape[2],))
    generator = torch.Generator(weight.device).manual_seed(0)
    for batch in batches:
        moment += torch.einsum("btm,btn->mn", batch.inputs * batch.real[..., None], batch.inputs)
        drawn = []
        for queries in batch.blocks():
            probability = batch.log_attention(batch.target_query, batch.target_key, queries).exp()
            picked = torch.multinomial(probability.flatten(0, 2), 1, generator=generator).view(probability.shape[:3])
            per_query = batch.key.repeat_interleave(weight.shape[0] // batch.key.shape[1], dim=1)
            key = per_query.gather(2, picked[..., None].expand(-1, -1, -1, per_query.shape[-1]))
            drawn.append((key - mixed(probability, batch.key)) * batch.real[:, None, queries, None])
        centred = batch.rotate(torch.cat(drawn, dim=2) * batch.scaling, back=True)
        keys += torch.einsum("bhtd,bhte->hde", centred, centred)
    damped = []
    for matrix, share in zip((keys, moment), DAMPING, strict=True):
        values, vectors = torch.linalg.eigh((matrix / sum(batch.real.sum() for batch in batches)).double())
        mean = values.mean(-1, keepdim=True).clamp(min=1e-30)
        damped.append(((values.clamp(min=0) + share * mean).to(weight), vectors.to(weight)))
    return damped[0], damped[1]


def _preconditioned(gradient: Tensor, factors: Factors) -> Tensor:
    (key_values, key_vectors), (values, vectors) = factors
    turned = key_vectors.mT @ gradient @ vectors / (key_values[..., None] * values)
    return key_vectors @ turned @ vectors.mT


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))
