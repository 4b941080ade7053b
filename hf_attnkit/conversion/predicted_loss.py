"""What a merge loses, predicted from weights and statistics: one measure for all methods.

    keys     sum over query heads of E (s - s')^2, s and s' the scores of an old and the new key;
             query and key drawn independently, rotated pairs averaged over all angles
    values   sum over query heads of E |W_o v - W_o' v'|^2

each divided by the same sum without the primed part. 0 is exact; 1 is what dropping the heads would
lose; above 1 the new head does harm. For `pca` it is the share of the spectrum that is discarded.
"""

from __future__ import annotations

from torch import Tensor

from hf_attnkit.conversion import rotary
from hf_attnkit.conversion.heads import Heads
from hf_attnkit.conversion.moments import covariance, times


def key_energy(heads: Heads, query: Tensor, key: Tensor, second_moment: Tensor) -> tuple[float, float]:
    """Lost and total energy of a group's scores.

    Args:
        heads: the group as it was.
        query, key: the new ones, `(c, q, d, m + 1)` and `(d, m + 1)`.
    """
    lost = total = 0.0
    same = query is heads.query
    of_queries = second_moment if heads.query_moment is None else heads.query_moment
    if heads.rope is not None:
        pairs = heads.rope.pairs()
        # A score's part at one pair has one complex component.
        new_key = rotary.complex_rows(key, pairs)[..., None, :]
        of_new = _gram(times(new_key, second_moment), new_key)
        for old_query, new_query, old_key in zip(heads.query, query, heads.key, strict=True):
            q = rotary.complex_rows(old_query, pairs)[..., None, :]
            new_q = q if same else rotary.complex_rows(new_query, pairs)[..., None, :]
            k = rotary.complex_rows(old_key, pairs)[..., None, :]
            moments = of_queries, second_moment
            more = _energy(q, new_q, k, new_key, of_new, *moments)
            lost, total = lost + more[0] / 2, total + more[1] / 2  # the mean of cos^2
    plain = rotary.not_rotated(heads)
    if plain:
        moments = of_queries, covariance(second_moment) if heads.shifts_cancel else second_moment
        new_key = key[plain]
        of_new = _gram(times(new_key, moments[1]), new_key)
        for old_query, new_query, old_key in zip(heads.query, query, heads.key, strict=True):
            q = old_query[:, plain]
            new_q = q if same else new_query[:, plain]
            more = _energy(q, new_q, old_key[plain], new_key, of_new, *moments)
            lost, total = lost + more[0], total + more[1]
    return lost, total


def value_energy(heads: Heads, value: Tensor, output: Tensor, second_moment: Tensor) -> tuple[float, float]:
    """Lost and total energy of a group's contributions to the output; `value` `(d, m + 1)`, `output` `(c, q, M, d)`."""
    moment = covariance(second_moment) if heads.output_bias else second_moment
    of_new, same = _gram(times(value, moment), value), output is heads.output
    lost = total = 0.0
    for old_value, old, new in zip(heads.value, heads.output, output, strict=True):
        grams = _blocks(old_value, value, times(old_value, moment), of_new)
        columns = old.flatten(0, 1).T  # (d, q M): the products are over query heads and outputs alike
        new_columns = columns if same else new.flatten(0, 1).T
        of_columns = None if same else _gram(new_columns, new_columns)
        more = _difference(_blocks(columns, new_columns, columns, of_columns), grams)
        lost, total = lost + more[0], total + more[1]
    return lost, total


def _energy(
    query: Tensor, new_query: Tensor, key: Tensor, new_key: Tensor, of_new: Tensor, query_moment: Tensor,
    key_moment: Tensor,
) -> tuple[float, float]:  # fmt: skip
    """E |conj(q) k - conj(q') k'|^2 and E |conj(q) k|^2 of one old head, summed over all but the last two axes, the
    components of one score: queries `(q, ..., d, m)`, keys `(..., d, m)`; `of_new` is the new keys' Gram matrix."""
    moved_query = times(query, query_moment)
    of_new_query = None if new_query is query else _gram(times(new_query, query_moment), new_query)
    of_query = [block.sum(0) for block in _blocks(query, new_query, moved_query, of_new_query)]
    return _difference(of_query, _blocks(key, new_key, times(key, key_moment), of_new))


def _blocks(old: Tensor, new: Tensor, moved: Tensor, of_new: Tensor | None) -> list[Tensor]:
    """Gram matrices old S old^H, old S new^H and new S new^H, given `old S` and the last; it is not needed for
    `new is old`."""
    first = _gram(moved, old)
    return [first] * 3 if of_new is None else [first, _gram(moved, new), of_new]


def _gram(moved: Tensor, rows: Tensor) -> Tensor:
    if rows.shape[-2] == 1:  # many products of single rows are faster as one elementwise product
        return (moved * rows.conj()).sum(-1, keepdim=True)
    return moved @ rows.mH


def _difference(one: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """The energy of old less new, and of old: sums of products of the blocks of two Gram matrices."""
    old, mixed, new = (float((a.conj() * b).real.sum()) for a, b in zip(one, other, strict=True))
    return old - 2 * mixed + new, old
