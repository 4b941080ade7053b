"""Cut and pool projections by head, all layers at once or not at all. Knows no model family.

A projection's heads are consecutive blocks of `head_dim` rows (query, key, value) or columns
(output): "(h d) m" and "m (h d)".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Edit:
    """New parameters for one `nn.Linear`: weight `(out, in)` and bias `(out,)` or `None`."""

    linear: nn.Linear
    weight: Tensor
    bias: Tensor | None


def keep_rows(linear: nn.Linear, heads: Sequence[int], head_dim: int) -> Edit:
    """Keep these heads of a query, key or value projection, in the order given."""
    weight = linear.weight.detach().unflatten(0, (-1, head_dim))[list(heads)].flatten(0, 1)
    bias = linear.bias
    if bias is not None:
        bias = bias.detach().unflatten(0, (-1, head_dim))[list(heads)].flatten()
    return Edit(linear, weight, bias)


def keep_columns(linear: nn.Linear, heads: Sequence[int], head_dim: int) -> Edit:
    """Keep these heads' inputs of an output projection, in the order given; the bias stays."""
    weight = linear.weight.detach().unflatten(1, (-1, head_dim))[:, list(heads)].flatten(1, 2)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return Edit(linear, weight, bias)


def pool_rows(linear: nn.Linear, num_groups: int, head_dim: int, pool: Callable[[Tensor], Tensor]) -> Edit:
    """Merge consecutive heads of a key or value projection into `num_groups` heads.

    `pool` maps `(num_groups, group, head_dim, ...)` to `(num_groups, head_dim, ...)`; it gets the
    weight in float32 or better, and the bias likewise.
    """

    def merge(parameter: Tensor) -> Tensor:
        precise = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        pooled = pool(precise.unflatten(0, (num_groups, -1, head_dim)))
        return pooled.flatten(0, 1).to(parameter.dtype)

    return Edit(linear, merge(linear.weight), None if linear.bias is None else merge(linear.bias))


def apply(edit: Edit) -> None:
    """Put new parameters into the same module, so that hooks on it stay.

    Device, dtype and `requires_grad` stay; an optimizer made before holds the old parameters.
    """
    linear = edit.linear
    weight = _parameter(edit.weight, linear.weight)
    bias = None if edit.bias is None else _parameter(edit.bias, linear.bias)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    linear.out_features, linear.in_features = edit.weight.shape


def present(linear: nn.Linear) -> Edit:
    """The edit that brings the module's present parameters back."""
    return Edit(linear, linear.weight, linear.bias)


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.contiguous(), requires_grad=like.requires_grad)
