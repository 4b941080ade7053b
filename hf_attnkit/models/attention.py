"""What is known of one attention of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.models.owners import Owners

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class SharedBias:
    """Something for each head, made once and given to attentions; see `shared_bias`.

    Attributes:
        name: of the parameter that it is made of, in the model, or of what the attentions are given.
        users: indices of the attentions that take it.
        rows: by name in the model, parameters outside of these attentions, and the rows of each head.
        problem: why it cannot be cut, or nothing.
    """

    name: str
    users: tuple[int, ...]
    rows: dict[str, Owners] = field(repr=False, compare=False)
    problem: str = ""


@dataclass(frozen=True)
class Attention:
    """A module that attends, as it was seen to run.

    Attributes:
        index: its number among the model's attentions, in calling order, cross-attention after all others.
        order: its place in calling order, cross-attention where it runs.
        path: the module's path in the model.
        module: the module that calls the attention interface (or would, see `calls_interface`).
        num_heads, num_key_value_heads: as queries and keys arrive.
        head_dim, value_head_dim: size of a head of queries and keys, and of values.
        is_causal: whether no query sees a later key.
        is_cross: whether the keys are of another sequence than the queries.
        window: as Transformers counts it (a query and the `window - 1` keys before it), or `None`.
        softcap: the scores' bound, or `None`.
        has_sinks: whether the softmax has learned keys without value.
        position_bias: whether scores get a bias that differs between heads and is made outside of this function.
        dropout: of the attention weights, in training.
        keywords: names of all keywords that came with a value.
        lengths: numbers of queries and of keys that it was seen with; 0 where that is unknown.
        calls: how often the model calls the module in one forward pass (ALBERT: once a layer).
        calls_per_forward: how often one forward pass of the module calls the interface.
        output: path of the output projection, the module that takes the attention's output as it is; `None` where
            no such module was seen (a gate or a norm may lie between, see `ownership`).
        calls_interface: whether it attends through Transformers' interface.
        reason: why not.
        inputs: what the module was given, for running it alone.
        bias: what it takes head by head from outside, or shares with others, or `None`.
    """

    index: int
    path: str
    module: nn.Module
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    is_causal: bool = False
    is_cross: bool = False
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    position_bias: bool = False
    dropout: float = 0.0
    keywords: tuple[str, ...] = ()
    lengths: tuple[int, int] = (0, 0)
    calls: int = 1
    calls_per_forward: int = 1
    output: str | None = None
    calls_interface: bool = True
    reason: str = ""
    order: int = 0
    inputs: Inputs = field(default=((), {}), repr=False, compare=False)
    bias: SharedBias | None = None

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_key_value_heads


def by_head(taken: Tensor, size: int) -> Tensor:
    """What an output projection takes, `(..., heads * size)`, as `(heads, batch, positions, size)`."""
    whole = taken.unflatten(-1, (-1, size))
    whole = whole.flatten(0, -4) if whole.dim() > 4 else whole
    return (whole if whole.dim() == 4 else whole[None]).permute(2, 0, 1, 3)


def given_by_head(attention: Attention) -> list[str]:
    """What the module is given that has something for each head, such as a bias of the scores; names with shapes."""
    args, kwargs = attention.inputs
    given = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    number = attention.num_heads
    batch = next((value.shape[0] for value in tensors.values()), 0)
    return [
        f"{name} {tuple(value.shape)}"
        for name, value in tensors.items()
        if (value.dim() == 4 and value.shape[1] == number > 1)
        or (value.dim() == 5 and value.shape[2] == number > 1)  # in blocks (LongT5)
        or (value.dim() == 3 and value.shape[0] == batch * number and number > 1)
    ]


def split_by_head(tensor: Tensor, num_heads: int) -> tuple[Tensor, int]:
    """What `given_by_head` names, and the axis along which its heads are."""
    return (tensor.unflatten(0, (-1, num_heads)), 1) if tensor.dim() == 3 else (tensor, tensor.dim() - 3)


def inputs_for(attention: Attention, heads: Sequence[int]) -> Inputs:
    """What the module is given, for these heads only where it has something for each head that others share."""
    if attention.bias is None or len(heads) == attention.num_heads:
        return attention.inputs
    names = {text.partition(" (")[0] for text in given_by_head(attention)}

    def some(value: Any) -> Any:
        whole, axis = split_by_head(value, attention.num_heads)
        found = whole.index_select(axis, torch.tensor(list(heads), device=value.device))
        return found.flatten(0, 1) if value.dim() == 3 else found

    args, kwargs = attention.inputs
    return (
        tuple(some(value) if f"argument {i}" in names else value for i, value in enumerate(args)),
        {name: some(value) if name in names else value for name, value in kwargs.items()},
    )


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a matrix product: `nn.Linear`, or the `Conv1D` of GPT-2."""
    return isinstance(module, (nn.Linear, Conv1D))
