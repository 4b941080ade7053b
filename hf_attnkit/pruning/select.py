"""`select_heads`: from scores to the heads to remove.

Heads are chosen in units. Transformers needs equally many query heads in every group that shares keys and values, so
in a grouped layer a unit is several heads:

    4 groups of 2     whole     {0 1} {2 3} {4 5} {6 7}     keys and values go with their group
                      across    {0 2 4 6} {1 3 5 7}         the least important of each group first

Layers that share a bias of the scores, head by head (T5, MPNet), must lose the same heads. There a unit is of all of
these layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import choice, in_range, integer
from hf_attnkit.common.checks import number as checked_number
from hf_attnkit.models.layers import (
    AttentionLayer,
    attention_layers,
    layers_sharing_a_bias,
    own_key_value_heads,
)

GROUPS = {"whole": "in whole groups", "across": "equally many from each group"}


class Unit(NamedTuple):
    """Heads of a layer, or of several, that can only be removed together; sorts by score, then layers, then heads."""

    score: float
    layers: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many heads go."""
        return len(self.layers) * len(self.heads)


def select_heads(
    importance: Tensor,
    *,
    fraction: float | None = None,
    num_heads: int | None = None,
    per_layer: bool = False,
    min_heads: int = 1,
    model: PreTrainedModel | None = None,
    num_key_value_heads: int | Sequence[int] | None = None,
    groups: str = "whole",
) -> dict[int, list[int]]:
    """Choose the least important heads, for `prune_heads`.

    Args:
        importance: `(num_layers, num_heads)`, higher = keep, as from `head_importance`; NaN marks
            places without a head.
        fraction: share of the heads to remove, in [0, 1); rounded down to whole heads (or units of several).
        num_heads: number of heads to remove; exactly one of `fraction` and `num_heads` is given.
        per_layer: apply the fraction or number to each layer by itself instead of to all together.
        min_heads: heads that every layer keeps at least; 0 allows to remove whole layers of heads.
        model: the model that was scored; which query heads share key/value heads is read from it, and which layers
            share a bias of the scores and must lose the same heads (T5, MPNet): these go by the mean importance over
            the layers, and count as many times as there are layers.
        num_key_value_heads: the same without the model: the number of key/value heads (per layer, if they differ).
            Without both every head is by itself.
        groups: what is removed from a grouped layer. "whole": whole groups, with their keys and values, by the mean
            importance of their heads. "across": equally many heads from every group, each group's least important
            first; keys and values stay.

    Returns:
        `{layer: [head, ...]}`, sorted, layers without a removed head left out. Ties go to the lower
        layer and head.

    Raises:
        TypeError, ValueError: for a bad shape or value, scores of another model, or more heads than may be removed.
    """
    if (fraction is None) == (num_heads is None):
        raise ValueError("give exactly one of fraction and num_heads")
    if fraction is not None:
        fraction = checked_number(fraction, "fraction", minimum=0, below=1, why="the share of heads to remove")
    if num_heads is not None:
        num_heads = integer(num_heads, "num_heads", minimum=0, why="the number of heads to remove")
    layers, units = units_of(importance, num_key_value_heads, groups, model=model)
    candidates = [removable(layer_units, min_heads) for layer_units in units]
    removed: list[Unit] = []
    for scope in [[index] for index in range(len(units))] if per_layer else [list(range(len(units)))]:
        total = sum(unit.size for index in scope for unit in units[index])
        # The small allowance keeps 0.3 * 10 heads at 3 although 0.3 * 10 is 2.9999999999999996.
        budget = int(fraction * total + 1e-9) if num_heads is None and fraction is not None else num_heads or 0
        if num_heads is not None and per_layer:
            budget *= len(layers[scope[0]])
        taken = 0
        for unit in sorted(unit for index in scope for unit in candidates[index]):
            if taken + unit.size <= budget:
                removed.append(unit)
                taken += unit.size
        smallest = min((unit.size for index in scope for unit in units[index]), default=1)
        if budget - taken >= smallest or (num_heads is not None and taken < budget):
            where = _named(layers[scope[0]]) if per_layer else "the model"
            alike = ", the same ones in layers that share a bias" if any(len(each) > 1 for each in layers) else ""
            raise ValueError(
                f"{budget} heads cannot be removed from {where}: of {total}, {GROUPS[groups]}{alike} and with at least "
                f"{min_heads} kept in each layer, {taken} can; ask for fewer"
            )
    return heads_of(removed)


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def units_of(
    importance: Tensor,
    num_key_value_heads: int | Sequence[int] | None = None,
    groups: str = "whole",
    *,
    model: PreTrainedModel | None = None,
) -> tuple[list[tuple[int, ...]], list[list[Unit]]]:
    """What can be removed at once, per layer or for layers that must lose the same heads.

    Returns:
        The layers that go together, most of them alone; and for each its units, of equally many heads.

    Raises:
        TypeError, ValueError: as `select_heads`.
    """
    if not isinstance(importance, Tensor):
        raise TypeError(f"importance is a {type(importance).__name__}; it must be a tensor (num_layers, num_heads)")
    if importance.dim() != 2:
        raise ValueError(f"importance has shape {tuple(importance.shape)}; it must be (num_layers, num_heads)")
    if importance.numel() and importance.isnan().all():
        raise ValueError(
            f"importance {tuple(importance.shape)} is NaN everywhere, which marks places without a head: either no "
            "head is left to choose from, or the score went wrong; look for NaN in the model's weights"
        )
    choice(groups, "groups", GROUPS)
    if groups == "across" and num_key_value_heads is None and model is None:
        raise ValueError(
            "groups='across' takes heads from every group; give num_key_value_heads, the number of groups, or model"
        )
    present = [heads_in(row, f"layer {layer}: importance") for layer, row in enumerate(importance)]
    counts = groups_per_layer(num_key_value_heads, present, model=model, what="importance")
    scores_of, units = importance.double().cpu(), []
    together = layers_together(model, present)
    for layers in together:
        scores = scores_of[list(layers), : present[layers[0]]].mean(0)
        size = _common_group_size(layers, len(scores), counts, groups)
        by_group = scores.view(-1, size)
        members = torch.arange(len(scores)).view(-1, size)
        if groups == "across" and size > 1:
            by_group, order = by_group.sort(dim=1, stable=True)
            by_group, members = by_group.T, members.gather(1, order).T
        means = by_group.mean(1).tolist()
        units.append([Unit(mean, layers, tuple(heads)) for mean, heads in zip(means, members.tolist(), strict=True)])
    return together, units


def layers_together(model: PreTrainedModel | None, num_heads: Sequence[int]) -> list[tuple[int, ...]]:
    """All layers: those that must lose the same heads together, each other one alone.

    Args:
        num_heads: of each layer; layers without heads are alone.
    """
    shared = [] if model is None else [[i for i in each if num_heads[i]] for each in layers_sharing_a_bias(model)]
    first = {layer: tuple(layers) for layers in shared for layer in layers}
    return list(dict.fromkeys(first.get(layer, (layer,)) for layer in range(len(num_heads))))


def _common_group_size(layers: Sequence[int], num_heads: int, counts: Sequence[int | None], groups: str) -> int:
    """Query heads per group, of layers that lose the same heads that of the largest groups.

    Raises:
        ValueError: if the groups of one layer lie across those of another.
    """
    sizes = sorted({group_size(layer, num_heads, counts[layer]) for layer in layers})
    if len(sizes) > 1 and (groups == "across" or any(sizes[-1] % size for size in sizes)):
        raise ValueError(
            f"{_named(layers)} share a bias and must lose the same heads, and have groups of {sizes} heads, so that "
            f"none can go {GROUPS[groups]}"
        )
    return sizes[-1]


def removable(units: Sequence[Unit], min_heads: int) -> list[Unit]:
    """The units of a layer in the order of removal, up to where it would have fewer than `min_heads` heads left.

    Raises:
        ValueError: for a `min_heads` that is no number of heads.
    """
    why = "the heads that every layer keeps; 0 allows to remove all heads of a layer"
    min_heads = integer(min_heads, "min_heads", minimum=0, why=why)
    total = sum(len(unit.heads) for unit in units)
    ordered = sorted(units)
    return [unit for rank, unit in enumerate(ordered) if total - (rank + 1) * len(unit.heads) >= min_heads]


def heads_of(units: Iterable[Unit]) -> dict[int, list[int]]:
    """The units' heads, `{layer: [head, ...]}`, sorted."""
    removed: dict[int, list[int]] = {}
    for unit in units:
        for layer in unit.layers:
            removed.setdefault(layer, []).extend(unit.heads)
    return {layer: sorted(heads) for layer, heads in sorted(removed.items())}


def heads_in(row: Tensor, what: str) -> int:
    """How many places of a row `(num_heads,)` hold a head: NaN after the last.

    Raises:
        ValueError: for a NaN before the last, naming `what`.
    """
    count = int((~row.isnan()).sum())
    if row[:count].isnan().any():
        raise ValueError(
            f"{what} has NaN before its last score ({row.tolist()}); only places after a layer's last head may be NaN, "
            "so this score went wrong"
        )
    return count


def group_size(layer: int, num_heads: int, num_key_value_heads: int | None) -> int:
    """Query heads per group, 1 where `num_key_value_heads` is `None` or the layer has no heads.

    Raises:
        ValueError: if the heads do not divide into groups.
    """
    if num_key_value_heads is None or num_key_value_heads == 0 == num_heads:
        return 1
    found = integer(num_key_value_heads, f"layer {layer}: num_key_value_heads", minimum=1)
    if num_heads % found:
        raise ValueError(f"layer {layer}: {num_heads} heads do not divide into num_key_value_heads={found} groups")
    return max(num_heads // found, 1)


def checked_heads(heads: Mapping[int, Iterable[int]], counts: Sequence[int]) -> dict[int, set[int]]:
    """`{layer: {head, ...}}` of layers that have so many heads, layers without a head left out.

    Raises:
        TypeError, ValueError: for anything else than a mapping of layers to heads of theirs, each named once.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads={heads!r} must be a mapping {{layer: [head, ...]}}, as from select_heads")
    checked = {}
    for layer, given in heads.items():
        index = in_range(layer, len(counts), "layer")
        if not isinstance(given, Iterable):
            raise TypeError(f"layer {index}: {given!r} must be a list of heads")
        given = list(given)
        if given and not counts[index]:
            raise ValueError(f"layer {index} has no heads left, so {given} cannot be removed; leave the layer out")
        listed = [in_range(head, counts[index], "head", f"layer {index}: ") for head in given]
        if len(set(listed)) != len(listed):
            twice = sorted({head for head in listed if listed.count(head) > 1})
            raise ValueError(f"layer {index}: heads {twice} are named more than once")
        if listed:
            checked[index] = set(listed)
    return checked


def groups_per_layer(
    num_key_value_heads: int | Sequence[int] | None,
    num_heads: Sequence[int],
    *,
    model: PreTrainedModel | None = None,
    what: str,
) -> Sequence[int | None]:
    """The number of key/value heads of each layer: given, or the model's; `None` where every head is by itself.

    Args:
        num_heads: of each layer, as `what` ("importance") has them.

    Raises:
        ValueError: for both, for another number of numbers, or heads that are not the model's.
    """
    if model is not None:
        if num_key_value_heads is not None:
            raise ValueError("give model or num_key_value_heads, not both")
        layers = attention_layers(model)
        require_heads_of(layers, num_heads, what)
        numbers = zip(layers, own_key_value_heads(model, layers), strict=True)
        return [number if len(layer.scored_heads) else 0 for layer, number in numbers]
    if not isinstance(num_key_value_heads, Sized):
        return [num_key_value_heads] * len(num_heads)
    if len(num_key_value_heads) != len(num_heads):
        raise ValueError(f"num_key_value_heads has {len(num_key_value_heads)} entries for {len(num_heads)} layers")
    return list(num_key_value_heads)


def require_heads_of(layers: Sequence[AttentionLayer], num_heads: Sequence[int], what: str) -> None:
    """Raise `ValueError` if these numbers of heads, which `what` is of, are not those of the model's layers."""
    expected = [len(layer.scored_heads) for layer in layers]
    if list(num_heads) != expected:
        raise ValueError(
            f"{what} has {list(num_heads)} heads in its layers, the model {expected}; compute it with this model as it "
            "is now"
        )
