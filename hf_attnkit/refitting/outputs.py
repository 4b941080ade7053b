"""Fit an output projection in closed form, so that changed attention gives what the untouched model gave.

With a_t the heads' outputs of the changed layer for token t (the layers below changed too) and y_t what the attention
should put out for the same token:

    W = argmin  sum_t |W a_t - y_t|^2  +  lambda |W - W_o|^2,     lambda = ridge * mean diagonal of sum_t a_t a_t^T

A bias, where there is one, is free: the sums are then of a_t and y_t less their means. It generalises
the rescaling of heads by Kwon et al. 2022 (arXiv 2204.09656) and takes no labels and no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_attnkit.models.layers import weight_of


class OutputSums:
    """Running sums over tokens: all that the fit of an output projection needs. m inputs, M outputs.

    Attributes:
        aa: `(m + 1, m + 1)`, sum of `[a; 1] [a; 1]^T`, float64.
        ya: `(M, m + 1)`, sum of `y [a; 1]^T`, float64.
        yy: sum of |y|^2.
        lost: sum of |o - y|^2, o what the layer puts out now.
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

    def add(self, a: Tensor, output: Tensor, y: Tensor) -> None:
        """Add tokens: what the projection gets `(tokens, m)`, puts out `(tokens, M)`, and should put out."""
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, y = a.to(dtype), y.to(dtype)
        self.lost += (output.to(dtype) - y).square().sum()
        self.yy += y.square().sum()
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        self.aa += a.T @ a
        self.ya += y.T @ a

    @property
    def num_tokens(self) -> int:
        return int(self.aa[-1, -1])

    def is_finite(self) -> bool:
        return bool(self.aa.isfinite().all() and self.ya.isfinite().all())

    def error_now(self) -> float:
        """|o - y|^2 of what the layer puts out now, as a share of |y|^2."""
        return self._share(self.lost)

    def error_of(self, linear: nn.Module) -> float:
        """The same of another projection of the same inputs: from the sums, no token is run again."""
        weight = weight_of(linear).double()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()  # type: ignore[operator]
        whole = torch.cat([weight, bias[:, None]], dim=1)
        return self._share(((whole @ self.aa - 2 * self.ya) * whole).sum() + self.yy)

    def _share(self, lost: Tensor) -> float:
        # What is left of a difference of large sums may be a little below zero.
        return float(lost.clamp(min=0) / self.yy) if self.yy > 0 else 0.0


def solve(sums: OutputSums, linear: nn.Module, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The ridge solution from the sums, weight `(M, m)` and bias in the projection's dtype."""
    aa, ya = sums.aa, sums.ya
    count, old = aa[-1, -1], weight_of(linear).double()
    gram, cross = aa[:-1, :-1], ya[:, :-1]
    mean, target_mean = aa[:-1, -1] / count, ya[:, -1] / count
    if linear.bias is not None:
        gram = gram - count * torch.outer(mean, mean)
        cross = cross - count * torch.outer(target_mean, mean)
    strength = ridge * gram.diagonal().mean()
    # Heads that put out nothing leave their columns undetermined, where they stay.
    strength = strength.clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if _is_rounding(gram, aa):
        weight = old
    else:
        weight = torch.linalg.solve(gram + strength * identity, (cross + strength * old).T).T
    dtype = weight_of(linear).dtype
    bias = None if linear.bias is None else (target_mean - weight @ mean).to(dtype)
    return weight.to(dtype), bias


def _is_rounding(gram: Tensor, aa: Tensor) -> bool:
    """Whether a Gram matrix about the mean is nothing but rounding, of inputs that are constant: not to be inverted."""
    size = torch.maximum(aa.diagonal()[:-1].mean(), gram.abs().max())
    return bool(size > 0 and gram.diagonal().mean() <= 1e-6 * size)
