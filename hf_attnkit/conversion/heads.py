"""A layer's projections by head, and a group of them: what every conversion method works on.

Each projection carries its bias as one more column, since its input is x with a 1 appended; then a
bias needs no formula of its own. With G key/value heads, q query heads for each, inputs of size m
and outputs of size M:

    query (G, q, head_dim, m + 1)    key, value (G, head_dim, m + 1)    output (G, q, M, head_dim)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_attnkit.editing.projections import Edit
from hf_attnkit.models.layers import AttentionLayer, Rope

ABSENT = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer, or of a group of its key/value heads. Shapes as above, float64.

    Keys are merged with their queries, values with their output projections, and neither looks at the other; nor
    does a method that does not transform look at queries and outputs. What is not looked at may be `ABSENT`.

    Attributes:
        rope: how keys are rotated, or `None`.
        norm: name of the norm between key projection and product, or empty.
        output_bias: whether the output projection has a bias, so that constants can move into it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    rope: Rope | None = None
    norm: str = ""
    output_bias: bool = False

    def group(self, members: Sequence[int]) -> Heads:
        """These key/value heads with their query heads."""
        index = list(members)
        return replace(
            self, query=self.query[index], key=self.key[index], value=self.value[index],
            output=self.output[index].contiguous(),
        )  # fmt: skip


def read(layer: AttentionLayer) -> Heads:
    """The heads of a layer in float64, on its device."""

    def rows(name: str) -> Tensor:
        linear: nn.Linear = getattr(layer, name)
        weight = linear.weight.detach()[layer.rows(name)].double()
        bias = linear.bias if linear.bias is not None else weight.new_zeros(linear.out_features)
        return torch.cat([weight, bias.detach()[layer.rows(name)].double()[:, None]], dim=1)

    groups, size = layer.num_key_value_heads, layer.head_dim
    return Heads(
        query=rows("query").view(groups, -1, size, layer.query.in_features + 1),
        key=rows("key").view(groups, size, -1),
        value=rows("value").view(groups, size, -1),
        output=layer.output.weight.detach().double().unflatten(1, (groups, -1, size)).permute(1, 2, 0, 3),
        rope=layer.rope,
        norm=layer.norm,
        output_bias=layer.output.bias is not None,
    )


def write(layer: AttentionLayer, heads: Heads, constant: Tensor | None = None) -> list[Edit]:
    """The edits that give a layer these heads.

    Args:
        heads: `key` and `value` may be of fewer heads than the layer has now.
        constant: `(M,)`, added to the output projection's bias.
    """
    edits = []
    for name, values in (("query", heads.query.flatten(0, 2)), ("key", heads.key.flatten(0, 1)),
                         ("value", heads.value.flatten(0, 1))):  # fmt: skip
        linear: nn.Linear = getattr(layer, name)
        bias = None if linear.bias is None else values[:, -1].to(linear.bias.dtype)
        edits.append(Edit(linear, values[:, :-1].to(linear.weight.dtype), bias, layer.rows(name)))
    output = layer.output
    output_bias = None
    if output.bias is not None:
        output_bias = output.bias.detach().double()
        output_bias = (output_bias if constant is None else output_bias + constant).to(output.bias.dtype)
    weight = heads.output.permute(2, 0, 1, 3).flatten(1).to(output.weight.dtype)
    edits.append(Edit(output, weight, output_bias, layer.rows("output")))
    return edits
