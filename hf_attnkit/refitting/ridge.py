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

Sums about the mean are taken in float64; what follows is in the precision of the weights, float32 at least: eigenvalues
below its rounding are far below the weakest ridge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_attnkit.models.layers import weight_of
from hf_attnkit.refitting.outputs import OutputSums, is_rounding, strength_of

RIDGES = (*(10 ** (exponent / 4) for exponent in range(-12, 13)), math.inf)
# As many folds as fit into this, of float64 sums (1 GiB), but at least 2.
FOLDS, FOLD_BYTES = 5, 2**30


# Shares of a fit that tokens count in by what they do to the model's outputs; in the rest of it they count alike.
SHARES = (0.0, 0.5, 0.9)
MEASURED = SHARES[-1]


class Fold(NamedTuple):
    """The sums over some sequences.

    Attributes:
        alike: each token counts 1, or by the inverse square of its residual stream.
        seen: each token counts by what it does to the model's outputs, 1 on the mean; `None` where that is not known.
    """

    alike: OutputSums
    seen: OutputSums | None = None

    def at(self, share: float) -> OutputSums:
        """Each token counts the share of `seen`, and the rest of `alike`."""
        return self.alike if self.seen is None else self.alike.combined(1 - share, self.seen, share)


@dataclass(frozen=True)
class Ridge:
    """What cross-validation chose.

    Attributes:
        ridge: a share of the mean diagonal of the Gram matrix; `None` for leaving the projection as it is.
        before, after: squared errors on sequences that the fit did not see, as a share of the target's sum of squares:
            of the projection as it is, and of the one chosen.
        share: of `SHARES`, in which the fit counts tokens by what they do.
    """

    ridge: float | None
    before: float
    after: float
    share: float = MEASURED


def num_folds(linear: nn.Module, sums: int = 1, *, aside: int = 0) -> int:
    """Into how many folds the sequences go, so that their sums stay within `FOLD_BYTES` where 2 do.

    Args:
        sums: how many `OutputSums` a fold has.
        aside: folds that there are next to these.
    """
    outputs, inputs = weight_of(linear).shape
    return max(2, min(FOLDS, FOLD_BYTES // (8 * sums * (inputs + 1) * (inputs + 1 + outputs)) - aside))


def total(folds: Iterable[OutputSums]) -> OutputSums:
    """The sums over all folds."""
    return reduce(OutputSums.plus, folds)


def choose_ridge(folds: Sequence[Fold], linear: nn.Module, further: Sequence[Fold] = ()) -> Ridge:
    """The ridge, and the share, whose fits lose least on the folds that they leave out.

    What is lost is always measured with the same share `MEASURED`. A fit in which few tokens count much has few tokens
    to fit, so one in which all count alike may still lose less of what counts.

    Args:
        folds: sums over the sequences of each.
        linear: the projection as it is.
        further: sums that are in every fit, and that no fit is tested on.
    """
    old, has_bias = weight_of(linear).double(), linear.bias is not None
    used = [fold for fold in folds if fold.alike.num_tokens]
    whole = total(fold.at(MEASURED) for fold in used)
    as_it_is = whole.lost_by(old, linear.bias)  # type: ignore[arg-type]
    best = Ridge(None, whole.share(as_it_is), whole.share(as_it_is))
    least, dtype = float(as_it_is), torch.promote_types(weight_of(linear).dtype, torch.float32)
    for share in SHARES if used[0].seen is not None else (MEASURED,):
        if len(used) < 2:
            break
        everything = total(fold.at(share) for fold in (*used, *further))
        lost = torch.zeros(len(RIDGES), dtype=torch.float64)
        for fold in used:
            others, test = everything.less(fold.at(share)), fold.at(MEASURED)
            means = others.means(has_bias)
            gram, cross, _ = others.centred(*means)
            test_gram, test_cross, square = test.centred(*means)
            test_rest = test_cross - old @ test_gram
            kept = square - ((test_cross + test_rest) * old).sum()
            if is_rounding(gram, others.aa):
                lost += float(kept)
            else:
                sums = (gram, cross - old @ gram, test_gram, test_rest, kept)
                lost += left_out(*(each.to(dtype) for each in sums))
        index = int(lost.argmin())
        if lost[index] < least:
            least = float(lost[index])
            best = Ridge(RIDGES[index], best.before, whole.share(lost[index]), share)
    return best


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
    strengths = torch.stack([strength_of(ridge, gram) for ridge in RIDGES]).nan_to_num(math.inf, math.inf)
    shrunk = 1 / (values.clamp(min=0) + strengths[:, None])  # (ridges, m); 0 for infinity
    errors = kept - 2 * (shrunk @ linear) + ((shrunk @ square) * shrunk).sum(1)
    found: Tensor = errors.double().cpu()
    return found
