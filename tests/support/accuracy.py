"""When two results count as equal: bounds that follow from rounding, none of them tuned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS64 = torch.finfo(torch.float64).eps


def assert_exact64(actual: Tensor, expected: Tensor, *, terms: int) -> None:
    """Two float64 computations of the same formula, each with sums of at most `terms` terms.

    A sum of n terms is off by at most n eps of the sum of their magnitudes. Attention has three sums
    in a row (scores, normaliser, values; as many again backward), and an error of a score is
    multiplied by that score, at most about 10 here: together below 100 (terms + 64) eps times the
    largest result, 64 being the most features of a head. A wrong mask or head is off by 1e-2.
    """
    bound = 100 * (terms + 64) * EPS64 * max(1.0, expected.abs().max().item())
    error = (actual - expected).abs().max().item()
    assert error <= bound, f"off by {error:.3g}, rounding explains {bound:.3g}"


def assert_as_accurate(
    actual: Tensor, plain: Tensor, exact: Tensor, *, terms: int = 64, magnitude: float | None = None
) -> None:
    """The project's rule: the error against a float64 run is at most twice the plain implementation's
    in the same precision.

    The plain error can be 0 or small by luck in a small tensor. Any computation may round its
    `terms`-long sums in another order, a random walk of sqrt(terms) roundings of half an eps, with
    twice that for the largest of many: the floor is sqrt(terms) eps of the largest value, or of
    `magnitude` where larger values cancelled on the way.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    floor = terms**0.5 * torch.finfo(actual.dtype).eps * (magnitude or exact.abs().max().item())
    ours, theirs = ((x.double() - exact.double()).abs().max().item() for x in (actual, plain))
    assert ours <= 2 * theirs + floor, f"off by {ours:.3g}, plain attention by {theirs:.3g}, floor {floor:.3g}"


def gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    """Output, and the gradients of a random projection of it with respect to the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    output.backward(direction.to(output))
    return output.detach(), *(leaf.grad for leaf in leaves)
