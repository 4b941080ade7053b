"""A layer's projections by head, and a group of them: what every conversion method works on.

Each projection carries its bias as one more column, since its input is x with a 1 appended; then a
bias needs no formula of its own. With G key/value heads, q query heads for each, inputs of size m
and outputs of size M:

    query (G, q, head_dim, m + 1)    key, value (G, head_dim, m + 1)    output (G, q, M, head_dim)

Queries, keys and values may be of different inputs (cross-attention), and values have a head size of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_attnkit.editing.projections import Edit
from hf_attnkit.models.layers import AttentionLayer, weight_of
from hf_attnkit.models.rotary_pairs import Rope

ABSENT = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer, or of a group of its key/value heads. Shapes as above, float64.

    Keys are merged with their queries, values with their output projections, and neither looks at the other; nor
    does a method that does not transform look at queries and outputs. What is not looked at may be `ABSENT`.

    Attributes:
        rope: how keys are rotated, or `None`.
        norm: what is between key projection and product, or empty.
        output_bias: whether the output projection has a bias, so that constants can move into it.
        shifts_cancel: whether a constant in all scores of a query changes nothing, as a softmax has it.
        query_moment, value_moment: second moment of the input of the query (value) projection, where it is another one
            than the keys'.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    rope: Rope | None = None
    norm: str = ""
    output_bias: bool = False
    shifts_cancel: bool = True
    query_moment: Tensor | None = None
    value_moment: Tensor | None = None

    def group(self, members: Sequence[int]) -> Heads:
        """These key/value heads with their query heads."""
        index = list(members)
        return replace(
            self,
            query=self.query[index] if self.query.numel() else ABSENT,
            key=self.key[index],
            value=self.value[index],
            output=self.output[index].contiguous() if self.output.numel() else ABSENT,
        )


def read(layer: AttentionLayer) -> Heads:
    """The heads of a layer in float64, on its device; queries and outputs are `ABSENT` where they cannot be told."""
    groups, size, value_size = layer.num_key_value_heads, layer.head_dim, layer.value_head_dim
    output = ABSENT
    if layer.output is not None:
        output = layer.output_weight.double().unflatten(1, (groups, -1, value_size)).permute(1, 2, 0, 3)
    query = ABSENT if layer.query is None else _rows(layer, "query")
    return Heads(
        query=query if query is ABSENT else query.view(groups, -1, size, query.shape[-1]),
        key=_rows(layer, "key").view(groups, size, -1),
        value=_rows(layer, "value").view(groups, value_size, -1),
        output=output,
        rope=layer.rope,
        norm=layer.norm,
        output_bias=layer.output is not None and layer.output.bias is not None and layer.passes_constants,
        shifts_cancel=layer.shifts_cancel,
    )


def _rows(layer: AttentionLayer, name: str) -> Tensor:
    """A projection's rows with their bias as the last column, float64."""
    linear = getattr(layer, name)
    whole = weight_of(linear)
    rows = layer.rows(name)
    weight = whole[rows]
    found = torch.empty(len(weight), whole.shape[1] + 1, dtype=torch.float64, device=whole.device)
    found[:, :-1] = weight
    found[:, -1] = 0 if linear.bias is None else linear.bias.detach()[rows]
    return found


def write(layer: AttentionLayer, heads: Heads, constant: Tensor | None = None) -> list[Edit]:
    """The edits that give a layer these heads.

    Args:
        heads: `key` and `value` may be of fewer heads than the layer has now, where its rows are slices. Queries or
            outputs that are `ABSENT` stay.
        constant: `(M,)`, added to the output projection's bias.
    """
    edits = []
    for name, values in (("query", heads.query), ("key", heads.key), ("value", heads.value)):
        if not values.numel():
            continue
        linear: nn.Linear = getattr(layer, name)
        values = values.flatten(0, -2)
        bias = None if linear.bias is None else values[:, -1].to(linear.bias.dtype)
        edits.append(Edit(linear, values[:, :-1].to(linear.weight.dtype), bias, layer.rows(name)))
    if not heads.output.numel():
        return edits
    output = layer.output
    output_bias = None
    if output.bias is not None:
        output_bias = output.bias.detach().double()
        output_bias = (output_bias if constant is None else output_bias + constant).to(output.bias.dtype)
    weight = heads.output.permute(2, 0, 1, 3).flatten(1).to(output.weight.dtype)
    edits.append(Edit(output, weight, output_bias))
    return edits
