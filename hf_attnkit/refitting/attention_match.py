"""Fit a layer's query projection so that it attends as the untouched model does, after its keys changed.

With p_i the untouched model's attention of query i, k_j the changed keys, x_i the layer's input and R_i the rotary
embedding,

    W = argmin  sum_i KL(p_i || softmax_j(scaling * R_i W x_i . k_j))

for each query head by itself: a multinomial logistic regression, so convex in W. A few steps of conjugate gradients
(Polak and Ribiere 1969), each with a Newton step along its line, preconditioned by the Kronecker factors of the
curvature as in K-FAC (Martens and Grosse 2015, arXiv 1503.05671):

    d^2 KL / dW^2  ~  E[R_i^T Cov_{j ~ p_i}(scaling k_j) R_i]  (x)  E[x x^T]

the first of one key drawn for each query. Queries are linear in W, so those of a step follow from those of W and of the
direction. What is returned is the best W met, on sequences that the steps do not look at where there are some, so it is
never worse than the first: few steps are a firm ridge, more of them a weaker one.
The keys' projection stays: fitted in turn with the queries it gained little, in twice the time (docs/conversion.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attnkit.attention.mask import Mask
from hf_attnkit.models.rotary_pairs import Rope

# Shares of the factors' mean diagonals that are added to them, so that directions never seen stay as they are.
DAMPING = (0.3, 0.03)
# Numbers of one block of scores: 4 MiB in float32, which caches hold.
BLOCK = 2**20


@dataclass(frozen=True)
class Batch:
    """What a layer sees in one batch. B sequences, T tokens, H query heads of size d, G key heads.

    Attributes:
        inputs: `(B, T, m)`, of the query projection; with a 1 appended where that has a bias.
        key: `(B, G, T, d)`, the changed keys, as they enter the scores.
        target_query, target_key: `(B, H, T, d)` and `(B, G', T, d)`, those of the untouched model.
        mask: which keys are seen.
        counts: `(B, T)`, how much each query counts; 0 for padding.
        unseen: `(B, T)`, the same for those that the fit does not look at, for which `counts` is 0.
        rotation: complex `(B or 1, T, pairs)`, what the rotary embedding multiplies each pair by; `None` without.
    """

    inputs: Tensor
    key: Tensor
    target_query: Tensor
    target_key: Tensor
    mask: Mask
    scaling: float
    counts: Tensor
    rope: Rope | None = None
    rotation: Tensor | None = None
    unseen: Tensor | None = None

    def query(self, weight: Tensor) -> Tensor:
        """`(B, H, T, d)`, rotated, of a projection `(H, d, m)`."""
        flat = self.inputs @ weight.flatten(0, 1).mT
        return self._rotate(flat.unflatten(2, weight.shape[:2]).transpose(1, 2))

    def backward(self, gradient: Tensor) -> Tensor:
        """`(H, d, T * B)`: gradients `(B, H, T, d)` of rotated queries as those of the projection's output."""
        return self._rotate(gradient, back=True).permute(1, 3, 0, 2).flatten(2)

    def _rotate(self, query: Tensor, *, back: bool = False) -> Tensor:
        if self.rope is None or self.rotation is None:
            return query
        first, second = self.rope.pairs()
        factor = self.rotation[:, None].conj() if back else self.rotation[:, None]
        turned = torch.complex(query[..., first], query[..., second]) * factor
        rotated = query.clone()
        rotated[..., first], rotated[..., second] = turned.real, turned.imag
        return rotated

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Queries whose scores fit into memory together, and the keys that any of them sees."""
        batch, num_heads, length, _ = self.target_query.shape
        size = max(BLOCK // (batch * num_heads * length), 1)
        causal = self.mask.is_causal and self.mask.known_offset == 0
        for start in range(0, length, size):
            end = min(start + size, length)
            yield slice(start, end), slice(0, end if causal else length)

    def attention(self, query: Tensor, key: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Probabilities `(B, H, q, k)` of these queries, and the log-sum-exps `(B, H, q)` of their scores."""
        scores = grouped(query[:, :, queries] * self.scaling, key[:, :, keys])
        if self.mask.bias is not None:
            scores += self.mask.bias[..., queries if self.mask.bias.shape[-2] > 1 else slice(None), keys]
        visible = self.mask.visible(queries, keys)
        if visible is not None:
            scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
        probability = scores.softmax(-1)
        # The largest score's own probability tells the sum without another exponential of each.
        return probability, scores.amax(-1) - probability.amax(-1).log()


@dataclass(frozen=True)
class Target:
    """What the fit needs of the untouched attention p of one batch, whatever W is.

    Attributes:
        mean_key: `(B, H, T, d)`, sum_j p_ij k_j of the changed keys.
        entropy: `(B, H, T)`, in nats.
        drawn: `(B, H, T, d)`, for each query a key drawn from p, less the mean.
    """

    mean_key: Tensor
    entropy: Tensor
    drawn: Tensor


def target(batch: Batch, generator: torch.Generator) -> Target:
    """See `Target`."""
    means, drawn, entropy = [], [], []
    for queries, keys in batch.blocks():
        probability, lse = batch.attention(batch.target_query, batch.target_key, queries, keys)
        picked = torch.multinomial(probability.flatten(0, 2), 1, generator=generator).view(probability.shape[:3])
        key = batch.key.repeat_interleave(probability.shape[1] // batch.key.shape[1], dim=1)
        means.append(mixed(probability, batch.key[:, :, keys]))
        drawn.append(key.gather(2, picked[..., None].expand(-1, -1, -1, key.shape[-1])) - means[-1])
        own = mixed(probability, batch.target_key[:, :, keys])
        entropy.append(lse - batch.scaling * (batch.target_query[:, :, queries] * own).sum(-1))
    return Target(*(torch.cat(parts, dim=2) for parts in (means, entropy, drawn)))


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """`(B, H, q, k)` products of `(B, H, q, d)` with `(B, G, k, d)`, H / G heads for each key head."""
    batch, num_heads, length, size = query.shape
    stacked = query.reshape(batch, key.shape[1], -1, size)
    return (stacked @ key.mT).view(batch, num_heads, length, -1)


def mixed(weights: Tensor, key: Tensor) -> Tensor:
    """`(B, H, q, d)`, keys `(B, G, k, d)` weighted by `(B, H, q, k)`."""
    batch, num_heads, length, keys = weights.shape
    return (weights.reshape(batch, key.shape[1], -1, keys) @ key).view(batch, num_heads, length, -1)


def fit_queries(weight: Tensor, batches: Sequence[Batch], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fitted projection, and what it gains.

    Args:
        weight: `(H, d, m)`, the present one, with its bias as the last column if inputs have a 1 appended.
        batches: where they have queries that are `unseen`, each head takes the step that is best there.
        steps: of conjugate gradients; each reads all batches twice.

    Returns:
        The new weight, and `(H,)` mean KL divergence per query in nats before and after, lower is better; of what is
        unseen where there is some.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    targets = [target(batch, generator) for batch in batches]
    factors = _factors(weight, batches, targets)
    choice: _Choice | None = None
    best = weight
    queries = tried = [batch.query(weight) for batch in batches]
    direction = length = least = gradient = scaled = weight.new_zeros(())
    for step in range(steps + 1):
        divergence, unseen, slope = mean_divergence(tried, batches, targets)
        if choice is None:
            choice, least = _Choice(weight, divergence if unseen is None else unseen), divergence
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
            queries = [torch.where(whole, new, old) for new, old in zip(tried, queries, strict=True)]
            gradient, scaled = torch.where(whole, slope, gradient), torch.where(whole, conditioned, scaled)
            least, length = torch.where(better, divergence, least), torch.where(better, 0.0, length / 4)
            choice.look(weight, divergence if unseen is None else unseen, better)
        if step == steps:
            break
        changes = [batch.query(direction) for batch in batches]
        curvature = curvature_along(queries, changes, batches)
        newton = torch.where(curvature > 0, _dot(gradient, direction) / curvature.clamp(min=1e-30), 0.0)
        length = torch.where(length > 0, length, newton)[:, None, None]
        weight = best - length * direction
        tried = [query - length * change for query, change in zip(queries, changes, strict=True)]
        length = length[:, 0, 0]
    assert choice is not None
    return choice.best, choice.first, choice.least


class _Choice:
    """The best weights met, head by head, by a measure that the steps need not be made for."""

    def __init__(self, weight: Tensor, measured: Tensor) -> None:
        self.best, self.first, self.least = weight, measured, measured

    def look(self, weight: Tensor, measured: Tensor, taken: Tensor) -> None:
        """Weights `(H, d, m)`, what they measure `(H,)`, and which heads' steps were taken."""
        better = taken & (measured < self.least)
        self.best = torch.where(better[:, None, None], weight, self.best)
        self.least = torch.where(better, measured, self.least)


def mean_divergence(
    queries: Sequence[Tensor], batches: Sequence[Batch], targets: Sequence[Target]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(H,)` mean divergence, that of what is unseen, and the first one's gradient `(H, d, m)`.

    Args:
        queries: `Batch.query` of the weights, for each batch.
    """
    heads, inputs = queries[0].shape[1], batches[0].inputs.shape[-1]
    total, unseen = queries[0].new_zeros(2, heads)
    gradient = queries[0].new_zeros(heads, queries[0].shape[-1], inputs)
    for batch, aim, query in zip(batches, targets, queries, strict=True):
        slopes, crosses = [], []
        for part, keys in batch.blocks():
            probability, lse = batch.attention(query, batch.key, part, keys)
            crosses.append(lse - batch.scaling * (query[:, :, part] * aim.mean_key[:, :, part]).sum(-1))
            slopes.append(mixed(probability, batch.key[:, :, keys]))
        divergence = torch.cat(crosses, dim=2) - aim.entropy
        total += (divergence * batch.counts[:, None]).sum((0, 2))
        if batch.unseen is not None:
            unseen += (divergence * batch.unseen[:, None]).sum((0, 2))
        slope = (torch.cat(slopes, dim=2) - aim.mean_key) * (batch.scaling * batch.counts[:, None, :, None])
        gradient += batch.backward(slope) @ batch.inputs.flatten(0, 1)
    count = _count(batches)
    others = sum((float(batch.unseen.sum()) for batch in batches if batch.unseen is not None), 0.0)
    return total / count, unseen / others if others else None, gradient / count


def curvature_along(queries: Sequence[Tensor], changes: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """`(H,)` second derivative of the mean divergence along a direction: the mean variance of the scores' change.

    Args:
        queries, changes: `Batch.query` of the weights and of the direction, for each batch.
    """
    total = queries[0].new_zeros(queries[0].shape[1])
    for batch, query, change in zip(batches, queries, changes, strict=True):
        for part, keys in batch.blocks():
            probability, _ = batch.attention(query, batch.key, part, keys)
            scores = grouped(change[:, :, part] * batch.scaling, batch.key[:, :, keys])
            mean = (probability * scores).sum(-1, keepdim=True)
            variance = (probability * (scores - mean).square_()).sum(-1)
            total += (variance * batch.counts[:, None, part]).sum((0, 2))
    return total / _count(batches)


def _count(batches: Sequence[Batch]) -> Tensor:
    return sum((batch.counts.sum() for batch in batches), torch.zeros((), device=batches[0].counts.device))


Factors = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _factors(weight: Tensor, batches: Sequence[Batch], targets: Sequence[Target]) -> Factors:
    """Damped eigenvalues and eigenvectors of the curvature's two factors, `(H, d, d)` and `(m, m)`."""
    keys, moment = weight.new_zeros(*weight.shape[:2], weight.shape[1]), weight.new_zeros(2 * (weight.shape[2],))
    for batch, aim in zip(batches, targets, strict=True):
        inputs = batch.inputs.flatten(0, 1)
        moment += (inputs * batch.counts.view(-1, 1)).T @ inputs
        drawn = batch.backward(aim.drawn * (batch.scaling * batch.counts.sqrt()[:, None, :, None]))
        keys += drawn @ drawn.mT
    damped = []
    for matrix, share in zip((keys, moment), DAMPING, strict=True):
        values, vectors = torch.linalg.eigh((matrix / _count(batches)).double())
        mean = values.mean(-1, keepdim=True).clamp(min=1e-30)
        damped.append(((values.clamp(min=0) + share * mean).to(weight), vectors.to(weight)))
    return damped[0], damped[1]


def _preconditioned(gradient: Tensor, factors: Factors) -> Tensor:
    (key_values, key_vectors), (values, vectors) = factors
    turned = key_vectors.mT @ gradient @ vectors / (key_values[..., None] * values)
    return key_vectors @ turned @ vectors.mT


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))
