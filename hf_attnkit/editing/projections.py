"""Cut projections by head and replace their parameters. Knows no model family.

A projection's heads are consecutive blocks of `head_dim` rows (query, key, value) or columns
(output): "(h d) m" and "m (h d)". Several projections may be rows of one `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALL = slice(None)


@dataclass(frozen=True)
class Edit:
    """New parameters for these rows of one `nn.Linear`: weight `(out, in)` and bias `(out,)` or `None`.

    The number of rows may change; the other rows stay.
    """

    linear: nn.Linear
    weight: Tensor
    bias: Tensor | None
    rows: slice = field(default_factory=lambda: ALL)  # a slice has no hash, so dataclasses take it for mutable


def keep_rows(linear: nn.Linear, heads: Sequence[int], head_dim: int, rows: slice = ALL) -> Edit:
    """Keep these heads of a query, key or value projection, in the order given."""
    weight = linear.weight.detach()[rows].unflatten(0, (-1, head_dim))[list(heads)].flatten(0, 1)
    bias = linear.bias
    if bias is not None:
        bias = bias.detach()[rows].unflatten(0, (-1, head_dim))[list(heads)].flatten()
    return Edit(linear, weight, bias, rows)


def keep_columns(linear: nn.Linear, heads: Sequence[int], head_dim: int) -> Edit:
    """Keep these heads' inputs of an output projection, in the order given; the bias stays."""
    weight = linear.weight.detach().unflatten(1, (-1, head_dim))[:, list(heads)].flatten(1, 2)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return Edit(linear, weight, bias)


def blank_rows(linear: nn.Linear, head_dim: int, rows: slice = ALL) -> Edit:
    """One head of zeros instead of these heads of a query, key or value projection."""
    weight = linear.weight.new_zeros(head_dim, linear.in_features)
    return Edit(linear, weight, None if linear.bias is None else linear.bias.new_zeros(head_dim), rows)


def blank_columns(linear: nn.Linear, head_dim: int) -> Edit:
    """One head's inputs of an output projection, which it ignores, instead of all; the bias stays."""
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return Edit(linear, linear.weight.new_zeros(linear.out_features, head_dim), bias)


def whole(edits: Sequence[Edit]) -> list[Edit]:
    """One edit per module: those of its rows joined, with the rows between them."""
    by_linear: dict[int, list[Edit]] = {}
    for edit in edits:
        by_linear.setdefault(id(edit.linear), []).append(edit)
    return [_joined(parts) for parts in by_linear.values()]


def _joined(parts: list[Edit]) -> Edit:
    linear = parts[0].linear
    if len(parts) == 1 and parts[0].rows == ALL:
        return parts[0]
    weights, biases, position = [], [], 0
    for part in sorted(parts, key=lambda part: part.rows.start):
        between = slice(position, part.rows.start)
        weights += [linear.weight.detach()[between], part.weight]
        if linear.bias is not None:
            biases += [linear.bias.detach()[between], part.bias]
        position = part.rows.stop
    weights.append(linear.weight.detach()[position:])
    if linear.bias is None:
        return Edit(linear, torch.cat(weights), None)
    return Edit(linear, torch.cat(weights), torch.cat([*biases, linear.bias.detach()[position:]]))  # type: ignore[list-item]


def apply(edit: Edit) -> None:
    """Put the parameters of a whole module into it, so that hooks on it stay.

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
