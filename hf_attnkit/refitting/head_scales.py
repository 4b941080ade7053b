"""One factor for each head that is left, in closed form: the mask tuning of Kwon et al. 2022 (arXiv 2204.09656).

With W_h a_h,t what head h puts out for token t, b the output bias, and y_t what the attention should put out:

    s = argmin  sum_t | sum_h s_h W_h a_h,t + b - y_t |^2  +  lambda |s - 1|^2

The factors go into the columns of the output projection, so that nothing is left to do at inference. The fit of
whole projections (see `outputs`) has one unknown per weight instead of one per head. The ridge lambda is that fit's, a
share of the mean diagonal, where the paper damps an iterative solver.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_attnkit.models.layers import weight_of
from hf_attnkit.refitting.outputs import OutputSums, strength_of
from hf_attnkit.refitting.ridge import RIDGES, Ridge, left_out, total


def scaled(sums: OutputSums, linear: nn.Module, head_dim: int, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The projection with each head's columns times its factor, and the bias as it was, in the projection's dtype.

    Args:
        sums: of inputs that hold the heads' outputs, "(h d)".
    """
    heads = weight_of(linear).double().unflatten(1, (-1, head_dim))  # (M, h, d)
    gram, rest = _by_head(sums, linear, head_dim)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factors = 1 + torch.linalg.solve(gram + strength_of(ridge, gram) * identity, rest)
    weight = (heads * factors[:, None]).flatten(1).to(linear.weight.dtype)
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    return weight, None if bias is None else bias.detach().clone()


def choose_scale_ridge(
    folds: Sequence[OutputSums], linear: nn.Module, head_dim: int, further: Sequence[OutputSums] = ()
) -> Ridge:
    """As `ridge.choose_ridge`, for factors of heads. One of infinity leaves all as it is."""
    whole, everything = total(folds), total((*folds, *further))
    as_it_is = whole.lost_by(weight_of(linear), linear.bias)  # type: ignore[arg-type]
    lost = torch.zeros(len(RIDGES), dtype=torch.float64)
    used = [fold for fold in folds if fold.num_tokens]
    for fold in used if len(used) > 1 else ():
        gram, rest = _by_head(everything.less(fold), linear, head_dim)
        test_gram, test_rest = _by_head(fold, linear, head_dim)
        kept = fold.lost_by(weight_of(linear), linear.bias)  # type: ignore[arg-type]
        lost += left_out(gram, rest[None], test_gram, test_rest[None], kept)
    best = int(lost.argmin()) if len(used) > 1 else len(RIDGES) - 1
    if best == len(RIDGES) - 1:
        return Ridge(None, whole.share(as_it_is), whole.share(as_it_is))
    return Ridge(RIDGES[best], whole.share(as_it_is), whole.share(lost[best]))


def _by_head(sums: OutputSums, linear: nn.Module, head_dim: int) -> tuple[Tensor, Tensor]:
    """`(h, h)` Gram matrix of what the heads put out, and `(h,)` products of each with what is missing."""
    heads = weight_of(linear).double().unflatten(1, (-1, head_dim))
    cross = sums.ya[:, :-1]
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    if bias is not None:
        cross = cross - torch.outer(bias.detach().double(), sums.aa[-1, :-1])
    by_head = sums.aa[:-1, :-1].view(*heads.shape[1:], *heads.shape[1:])
    gram = torch.einsum("mhd,hdke,mke->hk", heads, by_head, heads)
    target = torch.einsum("mhd,mhd->h", heads, cross.unflatten(1, (-1, head_dim)))
    return gram, target - gram.sum(1)
