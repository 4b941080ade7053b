"""How firmly a fit keeps to what is there: the ridge by cross-validation over whole sequences.

The calibration is folded by sequences, since the tokens of one are alike: a token left out is predicted by its
neighbours, whatever the ridge. For each fold f the fit is made from the sums over all others, and its error is taken
from the sums over f, for all ridges from one eigendecomposition. With G the Gram matrix of the others about their
mean, R = sum y a^T - W_o G what W_o leaves, primes for the same of fold f about the others' mean, and
G + lambda = V (s + lambda) V^T,

    W - W_o = D = R V (s + lambda)^-1 V^T
    error on f  =  |y - W_o a|^2  -  2 tr(D R'^T)  +  tr(D G' D^T)

A ridge of infinity leaves the weights and fits the bias alone. The projection as it is, bias and all, is among the
choices, and what is chosen is never worse on what it did not see than that, as far as the folds can tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from hf_attnkit.models.layers import weight_of
from hf_attnkit.refitting.outputs import OutputSums, is_rounding, strength_of

RIDGES = (*(10 ** (exponent / 4) for exponent in range(-12, 13)), math.inf)
# As many folds as fit into this, of float64 sums (1 GiB), but at least 2.
FOLDS, FOLD_BYTES = 5, 2**30


@dataclass(frozen=True)
class Ridge:
    """What cross-validation chose.

    Attributes:
        ridge: a share of the mean diagonal of the Gram matrix; `None` for leaving the projection as it is.
        before, after: squared errors on sequences that the fit did not see, as a share of the target's sum of squares:
            of the projection as it is, and of the one chosen.
    """

    ridge: float | None
    before: float
    after: float


def num_folds(linear: nn.Module) -> int:
    """Into how many folds the sequences go, so that their sums stay within `FOLD_BYTES` where 2 do."""
    outputs, inputs = weight_of(linear).shape
    return max(2, min(FOLDS, FOLD_BYTES // (8 * (inputs + 1) * (inputs + 1 + outputs))))


def total(folds: Sequence[OutputSums]) -> OutputSums:
    """The sums over all folds."""
    return reduce(OutputSums.plus, folds)


def choose_ridge(folds: Sequence[OutputSums], linear: nn.Module) -> Ridge:
    """The ridge whose fits lose least on the folds that they leave out.

    Args:
        folds: sums over the sequences of each.
        linear: the projection as it is.
    """
    whole, old = total(folds), weight_of(linear).double()
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    lost, as_it_is = torch.zeros(len(RIDGES), dtype=torch.float64), whole.lost_by(old, bias)
    used = [fold for fold in folds if fold.num_tokens]
    if len(used) < 2:
        return Ridge(None, whole.share(as_it_is), whole.share(as_it_is))
    for fold in used:
        others = whole.less(fold)
        means = others.means(bias is not None)
        gram, cross, _ = others.centred(*means)
        test_gram, test_cross, square = fold.centred(*means)
        kept = ((old @ test_gram - 2 * test_cross) * old).sum() + square
        if is_rounding(gram, others.aa):
            lost += float(kept)
            continue
        lost += left_out(gram, cross - old @ gram, test_gram, test_cross - old @ test_gram, kept)
    best = int(lost.argmin())
    ridge = RIDGES[best] if lost[best] < float(as_it_is) else None
    return Ridge(ridge, whole.share(as_it_is), whole.share(as_it_is if ridge is None else lost[best]))


def left_out(gram: Tensor, rest: Tensor, test_gram: Tensor, test_rest: Tensor, kept: Tensor) -> Tensor:
    """`(ridges,)` squared errors on a fold, for each of `RIDGES`; see above.

    Args:
        gram, rest: `(m, m)` and `(M, m)`, G and R of the others.
        test_gram, test_rest: G' and R' of the fold.
        kept: the error on the fold with the weights as they are.
    """
    values, vectors = torch.linalg.eigh(gram)
    turned = rest @ vectors
    linear = (turned * (test_rest @ vectors)).sum(0)
    square = (turned.T @ turned) * (vectors.T @ test_gram @ vectors)
    errors = []
    for ridge in RIDGES:
        if ridge == math.inf:
            errors.append(kept)
            continue
        shrunk = 1 / (values.clamp(min=0) + strength_of(ridge, gram))
        errors.append(kept - 2 * (shrunk @ linear) + shrunk @ square @ shrunk)
    return torch.stack(errors).cpu()
