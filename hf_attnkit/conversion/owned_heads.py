"""The projections of an attention by head, read and written by owned rows: `Heads` for any model.

Rows may be of `nn.Linear` or Conv1D, of a fused projection or of one each. Where a head's keys or values are made by
more than one matrix and its bias (latent attention, a norm for each head), they cannot be merged and are refused by
the parameter's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.attention import Attention, is_linear
from hf_attnkit.models.layers import Rope
from hf_attnkit.models.owners import Ownership


@dataclass(frozen=True)
class Rows:
    """Where the heads of a role lie.

    Attributes:
        module: `nn.Linear` or Conv1D.
        rows: `(heads, size of a head)`: numbers of output features; for the output projection, of input features.
    """

    module: nn.Module
    rows: Tensor

    @property
    def weight(self) -> Tensor:
        """`(out, in)`."""
        weight = self.module.weight.detach()  # type: ignore[operator]
        return weight.T if isinstance(self.module, Conv1D) else weight

    def read(self) -> Tensor:
        """`(heads, size, in + 1)` in float64; the last column is the bias."""
        weight, bias = self.weight.double(), getattr(self.module, "bias", None)
        column = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        return torch.cat([weight, column[:, None]], 1)[self.rows.to(weight.device)]

    def write(self, values: Tensor, undo: Undo) -> None:
        """Give the heads these rows, `(heads, size, in + 1)`."""
        rows, flat = self.rows.flatten().to(values.device), values.flatten(0, 1)
        weight = self.weight.clone()
        weight[rows] = flat[:, :-1].to(weight.dtype)
        _give(self.module, "weight", weight.T.contiguous() if isinstance(self.module, Conv1D) else weight, undo)
        if getattr(self.module, "bias", None) is not None:
            bias = self.module.bias.detach().clone()  # type: ignore[operator]
            bias[rows] = flat[:, -1].to(bias.dtype)
            _give(self.module, "bias", bias, undo)


def _give(module: nn.Module, name: str, value: Tensor, undo: Undo) -> None:
    with torch.inference_mode(False):
        undo.set(module, name, nn.Parameter(value.clone(), getattr(module, name).requires_grad))


@dataclass(frozen=True)
class OwnedHeads:
    """An attention's heads, where they can be read.

    Attributes:
        query, output: `None` where they are not plain rows; then only methods that leave them as they are serve.
        others: parameters of the attention's module that are no part of these projections.
    """

    attention: Attention
    owned: Ownership
    key: Rows
    value: Rows
    query: Rows | None
    output: Rows | None
    others: tuple[str, ...]

    def heads(self, rope: Rope | None = None) -> Heads:
        """As conversion methods take them, see `Heads`."""
        groups = self.owned.num_key_value_heads
        query = ABSENT if self.query is None else self.query.read().unflatten(0, (groups, -1))
        output = ABSENT
        if self.output is not None:
            columns = self.output.weight.double()[:, self.output.rows.to(self.output.weight.device)]
            output = columns.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        bias = self.output is not None and getattr(self.output.module, "bias", None) is not None
        return Heads(query, self.key.read(), self.value.read(), output, rope=rope, output_bias=bias)

    def write(self, heads: Heads, group_size: int, undo: Undo, *, outer: bool) -> None:
        """Give each key/value head the one of its group, `heads` being of fewer.

        Args:
            outer: whether queries and output projections changed too.
        """
        self.key.write(heads.key.repeat_interleave(group_size, 0), undo)
        self.value.write(heads.value.repeat_interleave(group_size, 0), undo)
        if not outer:
            return
        assert self.query is not None and self.output is not None
        self.query.write(heads.query.flatten(0, 1), undo)
        output = self.output
        columns = output.rows.flatten().to(heads.output.device)
        weight = output.weight.clone()
        weight[:, columns] = heads.output.permute(2, 0, 1, 3).flatten(1).to(weight.dtype)
        _give(output.module, "weight", weight.T.contiguous() if isinstance(output.module, Conv1D) else weight, undo)


def owned_heads(model: nn.Module, attention: Attention, owned: Ownership) -> OwnedHeads:
    """The heads by what they own.

    Raises:
        ValueError: where keys and values are not rows of one matrix each, naming what else there is.
    """
    numbers = [owned.key_heads.index(group) for group in range(owned.num_key_value_heads)]
    key, value = (_rows(attention, owned, role, numbers) for role in ("key", "value"))
    for role, found in (("key", key), ("value", value)):
        if isinstance(found, str):
            why = f" ({owned.problem})" if owned.problem else ""
            raise ValueError(f"{attention.path}: its {role} heads cannot be merged: {found}{why}")
    assert isinstance(key, Rows) and isinstance(value, Rows)
    query = _rows(attention, owned, "query", list(range(attention.num_heads)))
    output = None
    if owned.output is not None and owned.output not in owned.coupled:
        width = attention.num_heads * attention.value_head_dim
        output = Rows(model.get_submodule(owned.output), torch.arange(width).unflatten(0, (attention.num_heads, -1)))
    used = {id(p) for rows in (key, value, query, output) if isinstance(rows, Rows) for p in rows.module.parameters()}
    others = tuple(name for name, p in attention.module.named_parameters() if id(p) not in used)
    return OwnedHeads(attention, owned, key, value, query if isinstance(query, Rows) else None, output, others)


def _rows(attention: Attention, owned: Ownership, role: str, numbers: list[int]) -> Rows | str:
    """The rows of one matrix that make the heads of a role, or why there are none."""
    names = [name for name, one in owned.owned.items() if role in one.rows]
    matrices = [name for name in names if name in owned.matrices]
    linear = [name for name in matrices if is_linear(attention.module.get_submodule(name.rpartition(".")[0]))]
    if len(linear) != 1 or not linear[0].endswith(".weight"):
        return "they have no rows of their own in a matrix" if not matrices else f"{', '.join(matrices)} make them"
    path = linear[0].removesuffix(".weight")
    if extra := [name for name in names if name not in (linear[0], f"{path}.bias")]:
        return f"{extra[0]} has something for each of them next to the matrix"
    own = owned.owned[linear[0]]
    rows = [own.of(role, number) for number in numbers]
    size = attention.value_head_dim if role == "value" else attention.head_dim
    if any(len(each) != size for each in rows):
        return f"{linear[0]} has {len(rows[0])} rows for a head of {size} (latent attention)"
    module = attention.module.get_submodule(path)
    if own.dim != (1 if isinstance(module, Conv1D) else 0):
        return f"{linear[0]} takes them and does not make them"
    return Rows(module, torch.stack(rows))
