"""One factor for each head that is left, in closed form: the mask tuning of Kwon et al. 2022 (arXiv 2204.09656).

With W_h a_h,t what head h puts out for token t, b the output bias, and y_t what the attention should put out:

    s = argmin  sum_t | sum_h s_h W_h a_h,t + b - y_t |^2  +  lambda |s - 1|^2

The factors go into the columns of the output projection, so that nothing is left to do at inference. The fit of
whole projections (see `outputs`) has one unknown per weight instead of one per head. The ridge lambda is that fit's, a
share of the mean diagonal, where the paper damps an iterative solver.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attnkit.models.layers import weight_of
from hf_attnkit.refitting.outputs import OutputSums


def scaled(sums: OutputSums, linear: nn.Module, head_dim: int, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The projection with each head's columns times its factor, and the bias as it was, in the projection's dtype.

    Args:
        sums: of inputs that hold the heads' outputs, "(h d)".
    """
    old = weight_of(linear).double()
    heads = old.unflatten(1, (-1, head_dim))  # (M, h, d)
    cross = sums.ya[:, :-1]
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    if bias is not None:
        cross = cross - torch.outer(bias.detach().double(), sums.aa[-1, :-1])
    by_head = sums.aa[:-1, :-1].view(*heads.shape[1:], *heads.shape[1:])
    gram = torch.einsum("mhd,hdke,mke->hk", heads, by_head, heads)
    target = torch.einsum("mhd,mhd->h", heads, cross.unflatten(1, (-1, head_dim)))
    strength = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factors = torch.linalg.solve(gram + strength * identity, target + strength)
    weight = (heads * factors[:, None]).flatten(1).to(linear.weight.dtype)
    return weight, None if bias is None else bias.detach().clone()
