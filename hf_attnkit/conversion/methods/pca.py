"""The shared key and value that lose least, in closed form.

A group need not share a basis. Any invertible map of a head's values is undone in its output
projection, any map of its keys in its query projection (under a rotary embedding: one complex
factor per rotated pair, see `rotary`). So each old head gets a map of its own, folded into W_q and
W_o, and the shared head is the best approximation of low rank (Eckart and Young 1936). With
S = E[x x^T], x the input of the attention with a 1 appended:

    values         sum over query heads of  E |W_o (W_v - map V) x|^2           rank head_dim
    keys           sum over query heads of  E (q . (W_k - map K) x)^2           rank (not rotated components)
    rotated keys   the same per pair, averaged over all angles                  complex rank 1

A constant added to the keys adds the same to all scores of a query and cancels in the softmax, and
a constant in the values passes through the softmax into the output bias. So where there is no
rotation, or where there is an output bias, the mean of x costs nothing and S is its covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_attnkit.conversion import rotary
from hf_attnkit.conversion.heads import Heads
from hf_attnkit.conversion.moments import covariance, times

TRANSFORMS = True
USES_STATISTICS = True


def key(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Queries with the maps folded in, and the shared key."""
    query, shared = heads.query.clone(), heads.key.new_zeros(heads.key.shape[1:])
    of_queries = second_moment if heads.query_moment is None else heads.query_moment
    if heads.rope is not None:
        pairs = heads.rope.pairs()
        rows = rotary.complex_rows(heads.query, pairs)
        rotated, factors = _rank_one(rotary.complex_rows(heads.key, pairs), rows, second_moment, of_queries)
        rotary.set_rows(shared, pairs, rotated)
        rotary.set_rows(query, pairs, rows * factors.conj()[:, None, :, None])
    plain = rotary.not_rotated(heads)
    if plain:
        rows = heads.query[:, :, plain]
        metric = _metric(rows, of_queries)
        moment = covariance(second_moment) if heads.shifts_cancel else second_moment
        shared[plain], maps = _low_rank(heads.key[:, plain], metric, moment)
        query[:, :, plain] = torch.einsum("gef,gqem->gqfm", maps, rows)
    return query, shared


def value(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The shared value, and output projections with the maps folded in."""
    metric = torch.einsum("gqme,gqmf->gef", heads.output, heads.output)
    shared, maps = _low_rank(heads.value, metric, covariance(second_moment) if heads.output_bias else second_moment)
    return shared, torch.einsum("gqme,gef->gqmf", heads.output, maps)


def key_lost(heads: Heads, second_moment: Tensor) -> Callable[[Sequence[int]], float]:
    """The energy of scores that `key` loses for a group of these heads, as a function of their numbers.

    It is what the shared head's rank leaves of the group's spectrum. One Gram matrix of all heads holds every group's.
    """
    of_queries = second_moment if heads.query_moment is None else heads.query_moment
    parts: list[Callable[[list[int]], float]] = []
    if heads.rope is not None:
        pairs = heads.rope.pairs()
        rows = rotary.complex_rows(heads.query, pairs)
        weighted = rotary.complex_rows(heads.key, pairs) * _weight(rows, of_queries)[..., None]
        hermitian = _between(weighted, second_moment).cpu()  # as in `_low_rank_lost`
        # The mean of cos^2 over all angles.
        parts.append(lambda members: _discarded(hermitian[:, members][:, :, members], 1) / 2)
    plain = rotary.not_rotated(heads)
    if plain:
        rows = heads.query[:, :, plain]
        moment = covariance(second_moment) if heads.shifts_cancel else second_moment
        parts.append(_low_rank_lost(heads.key[:, plain], _metric(rows, of_queries), moment))
    return lambda members: sum(part(list(members)) for part in parts)


def value_lost(heads: Heads, second_moment: Tensor) -> Callable[[Sequence[int]], float]:
    """The same of outputs, which `value` loses."""
    moment = covariance(second_moment) if heads.output_bias else second_moment
    lost = _low_rank_lost(heads.value, torch.einsum("gqme,gqmf->gef", heads.output, heads.output), moment)
    return lambda members: lost(list(members))


def _low_rank_lost(heads: Tensor, metric: Tensor, moment: Tensor) -> Callable[[list[int]], float]:
    """The least that `_low_rank` minimises, of some of the heads `(G, d, m)`."""
    roots = torch.stack([_roots(matrix)[0] for matrix in metric])
    stacked = (roots @ heads).flatten(0, 1)
    count, size = heads.shape[:2]
    gram = (times(stacked, moment) @ stacked.T).view(count, size, count, size)
    gram = gram.cpu()  # a search takes a thousand small spectra, one after the other, which a GPU takes longer for
    return lambda members: _discarded(gram[members][:, :, members].reshape(len(members) * size, -1), size)


def _discarded(matrix: Tensor, rank: int) -> float:
    """The sum of all but the largest eigenvalues of Hermitian matrices `(..., n, n)`."""
    values = torch.linalg.eigvalsh((matrix + matrix.mH) / 2)[..., :-rank]
    return float(values.clamp(min=0).sum())


def _low_rank(heads: Tensor, metric: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """`V` `(d, m)` and maps `(c, d, d)` that minimise sum_c tr(metric_c E_c moment E_c^T), E_c = heads_c - maps_c V."""
    size = heads.shape[1]
    roots = [_roots(matrix) for matrix in metric]
    stacked = torch.cat([root @ head for (root, _), head in zip(roots, heads, strict=True)])
    directions = _eigenvectors(times(stacked, moment) @ stacked.T)[:, -size:]
    shared = directions.T @ stacked
    maps = torch.stack([inverse @ part for (_, inverse), part in zip(roots, directions.split(size), strict=True)])
    return _balanced(shared, maps, heads)


def _rank_one(key: Tensor, query: Tensor, moment: Tensor, of_queries: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(f, m)` and factors `(c, f)`, key_c ~ factor_c * row, for keys `(c, f, m)` and queries `(c, q, f, m)`."""
    weight = _weight(query, of_queries)
    weighted = key * weight[..., None]
    top = _eigenvectors(_between(weighted, moment))[..., -1]
    rows = torch.einsum("fc,cfm->fm", top.conj(), weighted)
    factors = top.T / weight
    # A scale of its own for each pair: the shared row is as long as the old ones are on average.
    scale = torch.linalg.vector_norm(key, dim=-1).mean(0) / torch.linalg.vector_norm(rows, dim=-1).clamp(min=1e-300)
    scale = torch.where(scale > 0, scale, 1.0)
    return rows * scale[:, None], factors / scale


def _metric(query: Tensor, of_queries: Tensor) -> Tensor:
    """`(c, d, d)`: what an error of each component of a key does to the scores, of queries `(c, q, d, m)`."""
    return torch.einsum("gqem,gqfm->gef", times(query, of_queries), query)


def _weight(query: Tensor, of_queries: Tensor) -> Tensor:
    """`(c, f)`: the same of rotated pairs, whose components turn into each other; queries `(c, q, f, m)`, complex."""
    energy = torch.stack([(times(head, of_queries) * head.conj()).real.sum((0, 2)) for head in query])
    # A head without queries at a pair has no say there, and must not divide by zero.
    return energy.clamp(min=torch.finfo(energy.dtype).tiny ** 0.5).sqrt()


def _between(rows: Tensor, moment: Tensor) -> Tensor:
    """`(f, c, c)`: products of the rows `(c, f, m)` of any two heads at each pair."""
    return torch.einsum("cfm,efm->fce", times(rows, moment), rows.conj())


def _balanced(shared: Tensor, maps: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, the shared head as long as the old ones are on average, as training expects it."""
    norm = torch.linalg.matrix_norm(shared)
    scale = torch.linalg.matrix_norm(heads).mean() / norm if norm > 0 else norm.new_ones(())
    scale = scale if scale > 0 else norm.new_ones(())
    return shared * scale, maps / scale


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric matrix of no negative eigenvalue, and the root's pseudo-inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root = values.clamp(min=0).sqrt()
    kept = root > root.amax() * 1e-10
    inverse = torch.where(kept, 1 / root.masked_fill(~kept, 1.0), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Of a Hermitian matrix, by increasing eigenvalue."""
    vectors: Tensor = torch.linalg.eigh((matrix + matrix.mH) / 2).eigenvectors
    return vectors
