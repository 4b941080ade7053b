"""Cut projections by head and replace their parameters. Knows no model family.

A projection's heads are consecutive blocks of `head_dim` rows (query, key, value) or columns
(output): "(h d) m" and "m (h d)". Several projections may be rows of one `nn.Linear`; rows that are
found by running may lie anywhere in it, or in GPT-2's Conv1D, whose weight is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.models.layers import weight_of

ALL = slice(None)
Rows = slice | Tensor


@dataclass(frozen=True)
class Edit:
    """New parameters for these rows of one matrix product: weight `(out, in)` and bias `(out,)` or `None`.

    The number of rows may change where they are a slice; the other rows stay.
    """

    linear: nn.Linear
    weight: Tensor
    bias: Tensor | None
    rows: Rows = field(default_factory=lambda: ALL)  # a slice has no hash, so dataclasses take it for mutable


def whole(edits: Sequence[Edit]) -> list[Edit]:
    """One edit per module: those of its rows joined, with the rows between them."""
    by_linear: dict[int, list[Edit]] = {}
    for edit in edits:
        by_linear.setdefault(id(edit.linear), []).append(edit)
    return [_joined(parts) for parts in by_linear.values()]


def _joined(parts: list[Edit]) -> Edit:
    linear = parts[0].linear
    if len(parts) == 1 and isinstance(parts[0].rows, slice) and parts[0].rows == ALL:
        return parts[0]
    slices = [(part.rows, part) for part in parts if isinstance(part.rows, slice)]
    if len(slices) < len(parts):
        return _scattered(parts)
    weights, biases, position = [], [], 0
    for rows, part in sorted(slices, key=lambda pair: pair[0].start):
        between = slice(position, rows.start)
        weights += [linear.weight.detach()[between], part.weight]
        if linear.bias is not None:
            biases += [linear.bias.detach()[between], part.bias]
        position = rows.stop
    weights.append(linear.weight.detach()[position:])
    if linear.bias is None:
        return Edit(linear, torch.cat(weights), None)
    return Edit(linear, torch.cat(weights), torch.cat([*biases, linear.bias.detach()[position:]]))  # type: ignore[list-item]


def _scattered(parts: list[Edit]) -> Edit:
    """The same of rows that lie anywhere; their number stays."""
    linear = parts[0].linear
    weight = weight_of(linear).clone()
    bias = None if linear.bias is None else linear.bias.detach().clone()
    for part in parts:
        rows = part.rows.to(weight.device) if isinstance(part.rows, Tensor) else part.rows
        weight[rows] = part.weight
        if bias is not None and part.bias is not None:
            bias[rows] = part.bias
    return Edit(linear, weight, bias)


def apply(edit: Edit) -> None:
    """Put the parameters of a whole module into it, so that hooks on it stay.

    Device, dtype and `requires_grad` stay; an optimizer made before holds the old parameters.
    """
    linear = edit.linear
    is_transposed = isinstance(linear, Conv1D)
    new = edit.weight.T if is_transposed and not isinstance(edit.weight, nn.Parameter) else edit.weight
    weight = _parameter(new, linear.weight)
    bias = None if edit.bias is None else _parameter(edit.bias, linear.bias)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    if is_transposed:
        linear.nx, linear.nf = weight.shape  # type: ignore[assignment]
    else:
        linear.out_features, linear.in_features = weight.shape


def present(linear: nn.Linear) -> Edit:
    """The edit that brings the module's present parameters back."""
    return Edit(linear, linear.weight, linear.bias)


@contextmanager
def applied(edits: Sequence[Edit]) -> Iterator[None]:
    """Within the context the modules have these parameters."""
    before = [present(edit.linear) for edit in edits]
    try:
        for edit in edits:
            apply(edit)
        yield
    finally:
        for edit in before:
            apply(edit)


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter is one that comes back, stored as its module stores it."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.contiguous(), requires_grad=like.requires_grad)
