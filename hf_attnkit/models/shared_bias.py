"""Something for each head that is made once and given to several attentions: T5's and MPNet's bias of the scores.

Heads can be cut out of such attentions if all of them lose the same ones, and what the bias is made of loses them too:

    relative_attention_bias.weight   (buckets, heads)   one column a head
        | bias (1, heads, queries, keys)
        +--> layer 0, layer 1, ... layer n

Who takes the same bias is seen by running: it is the very same tensor. What belongs to a head in it is what its
gradient says: that of `bias[:, h]` is zero in each parameter except in the rows of head h. What no parameter tells
apart (ALiBi, whose slopes follow from the number of heads) cannot be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_attnkit.models.attention import Attention, SharedBias, given_by_head, split_by_head
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.owners import Owners, owners_of
from hf_attnkit.models.tensors import cloned


@dataclass
class _Taken:
    """A tensor with something for each head.

    Attributes:
        users: indices of the attentions that use it.
        given: of those, the ones that are given it, and did not make it.
    """

    tensor: Tensor
    users: set[int]
    given: set[int]


def with_shared_bias(model: nn.Module, inputs: Mapping[str, Any], attentions: Sequence[Attention]) -> list[Attention]:
    """The same attentions, each with what it shares with others, or takes from outside of its module, head by head.

    Args:
        inputs: under which the model runs.
    """
    if not any(each.position_bias or given_by_head(each) for each in attentions):
        return list(attentions)
    leaves = {name: p.detach().requires_grad_(p.is_floating_point()) for name, p in model.named_parameters()}
    found: dict[int, SharedBias] = {}
    with torch.enable_grad():
        for taken in _run(model, inputs, attentions, leaves):
            bias = _shared(taken, attentions, leaves)
            if bias is None:
                continue
            if any(index in found for index in bias.users):
                bias = replace(bias, problem="several tensors bring it something for each head")
            found |= dict.fromkeys(bias.users, bias)
    return [replace(each, bias=found.get(each.index)) for each in attentions]


def _run(
    model: nn.Module, inputs: Mapping[str, Any], attentions: Sequence[Attention], leaves: dict[str, Tensor]
) -> list[_Taken]:
    """What attentions take head by head in a forward pass, with its graph."""
    taken: dict[int, _Taken] = {}
    entered: dict[int, set[int]] = {}
    kept: list[Any] = []  # an object that is gone could give its number to another

    def note(index: int, tensor: Tensor) -> None:
        one = taken.setdefault(id(tensor), _Taken(tensor, set(), set()))
        one.users.add(index)
        if id(tensor) in entered.get(index, ()):
            one.given.add(index)

    def enter(attention: Attention) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            kept.extend(tensors)
            entered.setdefault(attention.index, set()).update(map(id, tensors))
            own = replace(attention, inputs=(args, kwargs))
            by_head = [_named(own, name) for name in given_by_head(own)]
            if not attention.calls_interface:
                for tensor in by_head:
                    note(attention.index, tensor)
            # What a bias is made of is in no layer below: hidden states need no gradient.
            stay = {id(tensor) for tensor in by_head} | {id(each) for each in tensors if each.dim() > 3}
            held = [each.detach() if isinstance(each, Tensor) and id(each) not in stay else each for each in args]
            named = {
                name: each.detach() if isinstance(each, Tensor) and id(each) not in stay else each
                for name, each in kwargs.items()
            }
            return tuple(held), named

        return look

    by_module = {id(each.module): each for each in attentions}

    def watch(call: Call) -> tuple[Tensor, Any]:
        attention = by_module[id(call.module)]
        for tensor in (call.keywords.get("position_bias"), call.mask):
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[1] == attention.num_heads > 1:
                note(attention.index, tensor)
        return call.run()

    with ExitStack() as stack:
        for attention in attentions:
            stack.callback(attention.module.register_forward_pre_hook(enter(attention), with_kwargs=True).remove)
        stack.enter_context(watched([each.module for each in attentions if each.calls_interface], watch))
        functional_call(model, leaves, (), cloned(dict(inputs)))
    return list(taken.values())


def _named(attention: Attention, text: str) -> Tensor:
    """The tensor that `given_by_head` names."""
    args, kwargs = attention.inputs
    name = text.partition(" (")[0]
    found: Tensor = args[int(name.split()[-1])] if name.startswith("argument ") else kwargs[name]
    return found


def _shared(taken: _Taken, attentions: Sequence[Attention], leaves: dict[str, Tensor]) -> SharedBias | None:
    """What is shared through one tensor, or `None` where an attention makes it for itself."""
    by_index = {each.index: each for each in attentions}
    first = by_index[min(taken.users)]
    rows: dict[str, Owners] = {}
    problem = ""
    for name, table in _touched(_heads(taken.tensor, first.num_heads), leaves).items():
        one = owners_of("output", table)
        if isinstance(one, str):
            problem = f"{name}: {one}"
        elif one is not None:
            rows[name] = one
    makers = {each.index for each in attentions for name in rows if name.startswith(f"{each.path}.")}
    users = tuple(sorted(taken.users | makers))
    outside = {
        name: one for name, one in rows.items() if not any(name.startswith(f"{by_index[i].path}.") for i in users)
    }
    if len(users) == 1 and not outside and not taken.given:
        return None
    if not rows and first.index in taken.given:
        problem = "others give it something for each head that no parameter tells apart"
    if any(by_index[i].num_heads != first.num_heads for i in users):
        problem = "attentions with other numbers of heads take it too"
    names = list(rows) or [", ".join(given_by_head(first)) or "the bias of its scores"]
    return SharedBias(names[0], users, outside, problem)


def _touched(heads: Tensor, leaves: dict[str, Tensor]) -> dict[str, list[list[Tensor]]]:
    """By parameter: for each head, along each dimension, which rows its gradient touches."""
    if not heads.requires_grad:
        return {}
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(heads.shape[1:], generator=generator).to(heads)
    found: dict[str, list[list[Tensor] | None]] = {}
    for number, head in enumerate(heads):
        total = (head.masked_fill(~head.isfinite(), 0.0).clamp(-1e4, 1e4) * weights).sum()
        gradients = torch.autograd.grad(total, [leaves[n] for n in names], retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                used, dims = gradient != 0, range(gradient.dim())
                rows = [used.any(tuple(d for d in dims if d != dim)) if used.dim() > 1 else used for dim in dims]
                found.setdefault(name, [None] * len(heads))[number] = rows
    return {
        name: [[torch.zeros(size, dtype=torch.bool) for size in leaves[name].shape] if r is None else r for r in table]
        for name, table in found.items()
    }


def _heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Heads first."""
    whole, axis = split_by_head(tensor, num_heads)
    return whole.movedim(axis, 0)
