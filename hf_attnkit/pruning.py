"""From scores to heads (`select_heads`), and from heads to a smaller model (`prune_heads`).

A head is removed with its rows of the query projection and its columns of the output projection;
its key and value rows go when no query head of its group is left. In grouped layers Transformers
needs equally many query heads in every remaining group:

    groups of 4          q q q q | q q q q      possible: a whole group
                         q q . . | . q q .      possible: equally many in each
                         q q q . | q q q q      refused: unequal groups
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .change import Change
from .families import AttentionLayer, editable_layers, in_range
from .refit import refit
from .surgery import Edit, keep_columns, keep_rows


def select_heads(
    importance: Tensor,
    *,
    fraction: float | None = None,
    num_heads: int | None = None,
    per_layer: bool = False,
    min_heads: int = 1,
    num_key_value_heads: int | Sequence[int] | None = None,
) -> dict[int, list[int]]:
    """Choose the least important heads, for `prune_heads`.

    Args:
        importance: `(num_layers, num_heads)`, higher = keep, as from `head_importance`; NaN marks
            places without a head.
        fraction: share of the heads to remove, in [0, 1); rounded down to whole heads (or groups).
        num_heads: number of heads to remove; exactly one of `fraction` and `num_heads` is given.
        per_layer: apply the fraction or number to each layer by itself instead of to all together.
        min_heads: heads that every layer keeps at least.
        num_key_value_heads: for grouped models, the number of key/value heads (per layer, if they
            differ): whole groups are chosen, by the mean importance of their heads.

    Returns:
        `{layer: [head, ...]}`, sorted, layers without a removed head left out. Ties go to the lower
        layer and head.

    Raises:
        TypeError, ValueError: for a bad shape or value, or more heads than may be removed.
    """
    if not isinstance(importance, Tensor):
        raise TypeError(f"importance is a {type(importance).__name__}; it must be a tensor (num_layers, num_heads)")
    if importance.dim() != 2:
        raise ValueError(f"importance has shape {tuple(importance.shape)}; it must be (num_layers, num_heads)")
    if (fraction is None) == (num_heads is None):
        raise ValueError("give exactly one of fraction and num_heads")
    if fraction is not None and not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction!r} must be at least 0 and below 1: the share of heads to remove")
    if num_heads is not None and (not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 0):
        raise ValueError(f"num_heads={num_heads!r} must be an integer of at least 0: the number of heads to remove")
    if not isinstance(min_heads, int) or isinstance(min_heads, bool) or min_heads < 1:
        raise ValueError(f"min_heads={min_heads!r} must be an integer of at least 1: a layer keeps at least one head")

    units = _units(importance, num_key_value_heads)
    scopes = [[index] for index in range(len(units))] if per_layer else [list(range(len(units)))]
    removed: dict[int, list[int]] = {}
    for scope in scopes:
        total = sum(len(heads) for index in scope for _, heads in units[index])
        # The small allowance keeps 0.3 * 10 heads at 3 although 0.3 * 10 is 2.9999999999999996.
        budget = int(fraction * total + 1e-9) if fraction is not None else int(num_heads)  # type: ignore[arg-type]
        left = {index: sum(len(heads) for _, heads in units[index]) for index in scope}
        taken = 0
        for _, index, heads in sorted((score, layer, heads) for layer in scope for score, heads in units[layer]):
            if taken + len(heads) <= budget and left[index] - len(heads) >= min_heads:
                removed.setdefault(index, []).extend(heads)
                left[index] -= len(heads)
                taken += len(heads)
        smallest = min((len(heads) for index in scope for _, heads in units[index]), default=1)
        if budget - taken >= smallest or (num_heads is not None and taken < num_heads):
            where = f"layer {scope[0]}" if per_layer else "the model"
            raise ValueError(
                f"{budget} heads cannot be removed from {where}: of {total}, in whole groups and with at least "
                f"{min_heads} kept in each layer, {taken} can; ask for fewer"
            )
    return {index: sorted(removed[index]) for index in sorted(removed)}


def _units(
    importance: Tensor, num_key_value_heads: int | Sequence[int] | None
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Per layer, what can be removed at once: (score, heads)."""
    num_layers = importance.shape[0]
    if num_key_value_heads is None or isinstance(num_key_value_heads, int):
        groups: list[int | None] = [num_key_value_heads] * num_layers
    else:
        groups = list(num_key_value_heads)
    if len(groups) != num_layers:
        raise ValueError(f"num_key_value_heads has {len(groups)} entries for {num_layers} layers")
    units = []
    for index, (row, number) in enumerate(zip(importance.double(), groups, strict=True)):
        scores = row[~row.isnan()]
        if row[: len(scores)].isnan().any():
            raise ValueError(
                f"layer {index}: importance has NaN before its last score ({row.tolist()}); only places after a "
                "layer's last head may be NaN, so this score went wrong"
            )
        number = len(scores) if number is None else number
        if number < 1 or len(scores) % number:
            raise ValueError(
                f"layer {index}: {len(scores)} heads do not divide into num_key_value_heads={number} groups"
            )
        group = len(scores) // number
        means = scores.view(number, group).mean(1).tolist()
        units.append([(mean, tuple(range(g * group, (g + 1) * group))) for g, mean in enumerate(means)])
    return units


def prune_heads(
    model: PreTrainedModel,
    heads: Mapping[int, Iterable[int]],
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """Remove attention heads physically: the projections become smaller.

    Numbers of heads and layers are those of the model as it stands, so after one pruning the
    remaining heads are counted anew. A different number per layer is fine; such a model is saved
    with `per_layer_config` and reloads with `load_pretrained`.

    Args:
        model: a model of a supported family; changed in place.
        heads: `{layer: [query head, ...]}` to remove, as from `select_heads`.
        calibration: batches of model inputs, on which the output projections of what is left are then fitted to the
            untouched model, see `hf_attnkit.refit`; no labels, no training.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: a layer or head out of range or named twice, all heads of a layer, unequal groups,
            nothing to remove, an unsupported, quantized, PEFT-wrapped or weightless model, calibration batches
            that do not run or whose activations are not finite. The model is then unchanged.
    """
    layers = editable_layers(model)
    removed = _checked(heads, layers)
    edits: list[Edit] = []
    numbers = []
    for layer in layers:
        gone = removed.get(layer.index, set())
        kept = [head for head in range(layer.num_heads) if head not in gone]
        kept_groups = _kept_groups(layer, kept)
        numbers.append((len(kept), len(kept_groups)))
        if gone:
            edits.append(keep_rows(layer.query, kept, layer.head_dim, layer.rows("query")))
            edits.append(keep_columns(layer.output, kept, layer.head_dim))
            if len(kept_groups) < layer.num_key_value_heads:
                edits.append(keep_rows(layer.key, kept_groups, layer.head_dim, layer.rows("key")))
                edits.append(keep_rows(layer.value, kept_groups, layer.head_dim, layer.rows("value")))
        elif calibration is not None:
            # What it gets changes with the layers below, so its output is fitted too.
            edits.append(keep_columns(layer.output, kept, layer.head_dim))
    change = Change(model, edits, numbers)
    change.apply()
    if calibration is not None:
        refit(change, calibration)
    return model


def _checked(heads: Mapping[int, Iterable[int]], layers: Sequence[AttentionLayer]) -> dict[int, set[int]]:
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads={heads!r} must be a mapping {{layer: [head, ...]}}, as from select_heads")
    removed = {}
    for layer, given in heads.items():
        index = in_range(layer, len(layers), "layer")
        if not isinstance(given, Iterable):
            raise TypeError(f"layer {index}: {given!r} must be a list of heads")
        listed = [in_range(head, layers[index].num_heads, "head", f"layer {index}: ") for head in given]
        if len(set(listed)) != len(listed):
            twice = sorted({head for head in listed if listed.count(head) > 1})
            raise ValueError(f"layer {index}: heads {twice} are named more than once")
        if len(listed) == layers[index].num_heads:
            raise ValueError(f"layer {index}: all {len(listed)} heads would be removed; a layer keeps at least one")
        if listed:
            removed[index] = set(listed)
    if not removed:
        raise ValueError("no head to remove: heads is empty")
    return removed


def _kept_groups(layer: AttentionLayer, kept: Sequence[int]) -> list[int]:
    """Groups with query heads left; raises `ValueError` where they would be of unequal size."""
    sizes = torch.bincount(torch.tensor(kept) // layer.group_size, minlength=layer.num_key_value_heads).tolist()
    left = [group for group, size in enumerate(sizes) if size]
    if len({sizes[group] for group in left}) > 1:
        raise ValueError(
            f"layer {layer.index}: {layer.num_heads} query heads share {layer.num_key_value_heads} key/value heads in "
            f"groups of {layer.group_size} (heads {_groups(layer)}), and this selection would leave groups of "
            f"{sizes}; remove whole groups, or the same number of heads from each group"
        )
    return left


def _groups(layer: AttentionLayer) -> str:
    size = layer.group_size
    return ", ".join(f"{g * size}-{(g + 1) * size - 1}" for g in range(layer.num_key_value_heads))
