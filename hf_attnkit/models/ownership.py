"""What belongs to a head is what its gradient says.

The module that attends runs alone, on what it was given, with random float32 parameters of the same shapes (weights
that are zero by accident, or 16 bits, would mislead; the real ones are not touched). For each head h the gradient of a
random combination of `query[:, h]` with respect to each parameter is exactly zero except in the rows of that head:

    query head 0   q_proj.weight  x x . . . . . .      "x": some gradient in this row
    query head 1                  . . x x . . . .
    ...
    all alike      k_norm.weight  x x                  shared: it stays
    overlapping    q_norm.weight  and q_proj.weight    coupled: it cannot be cut, and is named

The same for key/value heads with `key` and `value`. Parameters that only the output sees (sinks, gates, biases of the
scores) show by the gradient of what the output projection takes, with query, key and value held fixed.

A module that never calls the interface shows all of it by what its output projection takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.owned_rows import owned_rows
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.random_run import RandomRun


def ownerships(model: nn.Module, attentions: Sequence[Attention]) -> list[Ownership]:
    """What belongs to the heads of each attention; looked at once for those that are alike.

    Raises:
        ValueError: for a module that does not run alone on what it was given.
    """
    known: dict[tuple[Any, ...], Ownership] = {}
    found = []
    for attention in attentions:
        key = signature(attention)
        if key not in known:
            known[key] = ownership(model, attention)
        one = known[key]
        if one.output is not None and attention.output != one.output:
            path = attention.output
            if path is None:  # found inside the module, at the same place in each
                path = attention.path + one.output.removeprefix(_path_of(known, one, attentions))
            one = replace(one, output=path)
        found.append(one)
    return [
        _if_built_again(model, attention, _with_bias(attention, one))
        for attention, one in zip(attentions, found, strict=True)
    ]


def ownership(model: nn.Module, attention: Attention) -> Ownership:
    """What belongs to the heads of one attention; see the top of this file."""
    with quiet(model), torch.enable_grad():
        run = RandomRun(attention)
        run.forward()
        return owned_rows(run)


def signature(attention: Attention) -> tuple[Any, ...]:
    """What attentions have in common whose heads own the same: class, shapes and numbers."""
    shapes = tuple((name, tuple(p.shape)) for name, p in attention.module.named_parameters())
    numbers = (attention.num_heads, attention.num_key_value_heads, attention.head_dim, attention.value_head_dim)
    inside = attention.output is not None and attention.output.startswith(f"{attention.path}.")
    output = attention.output.removeprefix(attention.path) if inside and attention.output else None
    flags = (attention.is_cross, attention.position_bias, attention.keywords, attention.calls_interface)
    return type(attention.module), shapes, numbers, output, flags, tuple(sorted(attention.inputs[1]))


def _path_of(known: dict[tuple[Any, ...], Ownership], one: Ownership, attentions: Sequence[Attention]) -> str:
    return next(each.path for each in attentions if known.get(signature(each)) is one)


# BigBird changes from sparse to full attention, and back, where a text is short or long.
_BUILDS_AGAIN = "set_attention_type"


def _if_built_again(model: nn.Module, attention: Attention, one: Ownership) -> Ownership:
    """The same, coupled where the model builds the module again while it runs, of the sizes that the config says."""
    parts = attention.path.split(".")
    above = [model.get_submodule(".".join(parts[:stop])) for stop in range(len(parts))]
    if not any(hasattr(module, _BUILDS_AGAIN) for module in above):
        return one
    return replace(
        one, coupled=one.coupled | {_BUILDS_AGAIN: "the forward pass builds attention modules again with it"}
    )


def _with_bias(attention: Attention, one: Ownership) -> Ownership:
    """The same, coupled where it takes something for each head that cannot be cut."""
    if attention.bias is None or not attention.bias.problem:
        return one
    return replace(one, coupled=one.coupled | {attention.bias.name: attention.bias.problem})
