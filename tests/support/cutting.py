"""What happens when heads are cut out of a model, and the same checked another way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.editing.cut_heads import cut_heads
from hf_attnkit.models.discovery import Discovery, discover, run_outputs
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships

# Kinds of refusals, by words of the message; the first that fits counts.
KINDS = {
    "no inputs": "no inputs could be made",
    "no attention": "has no attention",
    "not deterministic": "other outputs when it runs again",
    "one bias for several attentions": "is one for several attentions",
    "a parameter of two modules": "is shared with",
    "a parameter of one head": "belongs to the removed heads whole",
    "mixed heads": "heads cannot be cut",
    "not with fewer heads": "not run with fewer heads",
}


def a_group(attention_heads: int, owned: Ownership) -> list[int]:
    """The query heads of the first key/value head; the first head where that would be all."""
    first = [head for head in range(attention_heads) if owned.key_head_of(head, attention_heads) == 0]
    return first if len(first) < attention_heads else [0]


class Looked(NamedTuple):
    """What attends in a model, and what belongs to the heads of each."""

    found: Discovery
    owned: list[Ownership]


def outcome(model: PreTrainedModel) -> tuple[str, Looked | None]:
    """Whether a group of every attention can be cut at once ("exact"), of some ("partly"), or the kind of refusal.

    With it what was seen, where the model shows it.
    """
    looked = None
    try:
        discovery = discover(model)
        owned = ownerships(model, discovery.attentions)
        looked = Looked(discovery, owned)
        heads = {
            each.index: a_group(each.num_heads, own)
            for each, own in zip(discovery.attentions, owned, strict=True)
            if each.num_heads > 1 and not own.problem
        }
        if not heads:
            problem = next((own.problem for own in owned if own.problem), "one head")
            raise ValueError(f"heads cannot be cut: {problem}")
        whole = len(heads) == len(discovery.attentions)
        try:
            check(model, discovery, owned, heads)
        except ValueError:
            first = min(heads)
            check(model, discovery, owned, {first: heads[first]})
            whole = False
    except ValueError as error:
        return next((kind for kind, words in KINDS.items() if words in str(error)), f"unknown: {error}"), looked
    return "exact" if whole else "partly", looked


def check(
    model: PreTrainedModel, discovery: Discovery, owned: Sequence[Ownership], heads: Mapping[int, Sequence[int]]
) -> None:
    """Cut, and compare with slices zeroed in front of the output projections; the model is then as it was."""
    want = zeroed_outputs(model, discovery, owned, heads)
    before = copy.deepcopy(model.state_dict())
    cut = cut_heads(model, heads, discovery, owned)
    with torch.no_grad():
        got = run_outputs(model, discovery.inputs)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.values())
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * (1 + float(b.nan_to_num().abs().max())), equal_nan=True)
    cut.undo()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def zeroed_outputs(
    model: PreTrainedModel, discovery: Discovery, owned: Sequence[Ownership], heads: Mapping[int, Sequence[int]]
) -> list[Tensor]:
    """The model's outputs with slices of what the output projections take set to zero."""
    with ExitStack() as stack, torch.no_grad():
        for index, gone in heads.items():
            size, path = discovery.attentions[index].value_head_dim, owned[index].output
            assert path is not None

            def zero(_: nn.Module, args: Any, size: int = size, gone: Sequence[int] = gone) -> Any:
                taken = args[0].clone()
                for head in gone:
                    taken[..., head * size : (head + 1) * size] = 0
                return taken, *args[1:]

            stack.callback(model.get_submodule(path).register_forward_pre_hook(zero).remove)
        return run_outputs(model, discovery.inputs)
