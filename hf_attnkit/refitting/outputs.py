"""Fit an output projection in closed form, so that changed attention gives what the untouched model gave.

With a_t the heads' outputs of the changed layer for token t (the layers below changed too) and y_t what the attention
should put out for the same token:

    W = argmin  sum_t |W a_t - y_t|^2  +  lambda |W - W_o|^2,     lambda = ridge * mean diagonal of sum_t a_t a_t^T

A bias, where there is one, is free: the sums are then of a_t and y_t less their means. It generalises
the rescaling of heads by Kwon et al. 2022 (arXiv 2204.09656) and takes no labels and no gradients.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from hf_attnkit.models.layers import weight_of


class OutputSums:
    """Running sums over tokens: all that the fit of an output projection needs. m inputs, M outputs.

    Attributes:
        aa: `(m + 1, m + 1)`, sum of `w [a; 1] [a; 1]^T`, float64; w is what a token counts.
        ya: `(M, m + 1)`, sum of `w y [a; 1]^T`, float64.
        yy: sum of w |y|^2.
        lost: sum of w |o - y|^2, o what the layer puts out now.
        num_tokens: how many tokens these are.
    """

    def __init__(self, linear: nn.Module) -> None:
        """
        Args:
            linear: the projection, `nn.Linear` or Conv1D.
        """
        weight = weight_of(linear)
        (outputs, inputs), device = weight.shape, weight.device
        self.aa = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.ya = torch.zeros(outputs, inputs + 1, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)
        self.lost = torch.zeros((), dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, a: Tensor, output: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens: what the projection gets `(tokens, m)`, puts out `(tokens, M)`, and should put out.

        Args:
            weight: `(tokens,)`, what each counts; 1 by default.
        """
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, y = a.to(dtype), y.to(dtype)
        lost, square = (output.to(dtype) - y).square().sum(-1), y.square().sum(-1)
        self.num_tokens += len(a)
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        weighted = a
        if weight is not None:
            weight = weight.to(a)
            lost, square, weighted = lost * weight, square * weight, a * weight[:, None]
        self.lost += lost.sum()
        self.yy += square.sum()
        self.aa += weighted.T @ a
        self.ya += y.T @ weighted

    def plus(self, other: OutputSums) -> OutputSums:
        """The sums over the tokens of both."""
        found = self.combined(1, other, 1)
        found.num_tokens = self.num_tokens + other.num_tokens
        return found

    def less(self, other: OutputSums) -> OutputSums:
        """The sums without the other's tokens, which are among these."""
        found = self.combined(1, other, -1)
        found.num_tokens = self.num_tokens - other.num_tokens
        return found

    def combined(self, own: float, other: OutputSums, others: float) -> OutputSums:
        """Of the same tokens, each counting `own` of what it does here and `others` of what it does in the other."""
        found = copy.copy(self)
        for name in ("aa", "ya", "yy", "lost"):
            setattr(found, name, own * getattr(self, name) + others * getattr(other, name))
        return found

    def is_finite(self) -> bool:
        return bool(self.aa.isfinite().all() and self.ya.isfinite().all())

    def error_now(self) -> float:
        """w |o - y|^2 of what the layer puts out now, as a share of w |y|^2."""
        return self.share(self.lost)

    def error_of(self, linear: nn.Module) -> float:
        """The same of another projection of the same inputs: from the sums, no token is run again."""
        return self.share(self.lost_by(weight_of(linear), linear.bias))  # type: ignore[arg-type]

    def lost_by(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """w |W a + b - y|^2."""
        weight = weight.double()
        last = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        whole = torch.cat([weight, last[:, None]], dim=1)
        return ((whole @ self.aa - 2 * self.ya) * whole).sum() + self.yy

    def share(self, lost: Tensor) -> float:
        """Of w |y|^2."""
        # What is left of a difference of large sums may be a little below zero.
        return float(lost.clamp(min=0) / self.yy) if self.yy > 0 else 0.0

    def centred(self, mean: Tensor, target_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w (a - mean) (a - mean)^T, w (y - target_mean) (a - mean)^T and w |y - target_mean|^2."""
        count, first, second = self.aa[-1, -1], self.aa[:-1, -1], self.ya[:, -1]
        gram = self.aa[:-1, :-1] - torch.outer(first, mean) - torch.outer(mean, first) + count * torch.outer(mean, mean)
        cross = self.ya[:, :-1] - torch.outer(second, mean) - torch.outer(target_mean, first)
        cross = cross + count * torch.outer(target_mean, mean)
        return gram, cross, self.yy - 2 * (target_mean @ second) + count * target_mean.square().sum()

    def means(self, has_bias: bool) -> tuple[Tensor, Tensor]:
        """What a free bias takes out, the means of a and y; zeros without one."""
        mean, target_mean = self.aa[:-1, -1] / self.aa[-1, -1], self.ya[:, -1] / self.aa[-1, -1]
        return (mean, target_mean) if has_bias else (torch.zeros_like(mean), torch.zeros_like(target_mean))


def solve(sums: OutputSums, linear: nn.Module, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The ridge solution from the sums, weight `(M, m)` and bias in the projection's dtype."""
    old = weight_of(linear).double()
    mean, target_mean = sums.means(linear.bias is not None)
    gram, cross, _ = sums.centred(mean, target_mean)
    if is_rounding(gram, sums.aa) or ridge == math.inf:
        weight = old
    else:
        strength = strength_of(ridge, gram)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + strength * identity, (cross + strength * old).T).T
    dtype = weight_of(linear).dtype
    bias = None if linear.bias is None else (target_mean - weight @ mean).to(dtype)
    return weight.to(dtype), bias


def strength_of(ridge: float, gram: Tensor) -> Tensor:
    """lambda, for a ridge that is a share of the mean diagonal."""
    # Heads that put out nothing leave their columns undetermined, where they stay.
    return (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny ** 0.5)


def is_rounding(gram: Tensor, aa: Tensor) -> bool:
    """Whether a Gram matrix about the mean is nothing but rounding, of inputs that are constant: not to be inverted."""
    size = torch.maximum(aa.diagonal()[:-1].mean(), gram.abs().max())
    return bool(size > 0 and gram.diagonal().mean() <= 1e-6 * size)
