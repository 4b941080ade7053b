"""`prune_heads`: remove attention heads physically, which Transformers v5 no longer does.

A head is removed with its rows of the query projection and its columns of the output projection;
its key and value rows go when no query head of its group is left. In grouped layers Transformers
needs equally many query heads in every remaining group:

    groups of 4          q q q q | q q q q      possible: a whole group
                         q q . . | . q q .      possible: equally many in each
                         q q q . | q q q q      refused: unequal groups

A layer that loses all of its heads keeps a stand-in of one head that adds nothing; see `families`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.editing.change import Change
from hf_attnkit.editing.projections import Edit, blank_columns, blank_rows, keep_columns, keep_rows
from hf_attnkit.models.layers import AttentionLayer, editable_layers
from hf_attnkit.pruning.select import checked_heads
from hf_attnkit.refitting import refit as refits


@plain_mode()
def prune_heads(
    model: PreTrainedModel,
    heads: Mapping[int, Iterable[int]],
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    refit: str | None = None,
) -> PreTrainedModel:
    """Remove attention heads physically: the projections become smaller.

    Numbers of heads and layers are those of the model as it stands, so after one pruning the
    remaining heads are counted anew. A different number per layer is fine; such a model is saved
    with `per_layer_config` and reloads with `load_pretrained`. An optimizer made before holds the old
    parameters and changes nothing any more: make it after.

    Args:
        model: a model of a supported family; changed in place.
        heads: `{layer: [query head, ...]}` to remove, as from `select_heads`. Of a layer whose heads are all named
            only the bias of the output projection is left; in place of its heads it keeps one of zeros, without which
            Transformers' classes do not run.
        calibration: batches of model inputs, on which the output projections of what is left are then fitted, so that
            the residual stream is after each attention what it is in the untouched model, see `hf_attnkit.refit`; no
            labels, no training.
        refit: "output" (the default, where calibration is given) fits the output projections; "scale" fits one factor
            per head (Kwon et al. 2022), the published baseline, and multiplies it into the output projection.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: a layer or head out of range or named twice, unequal groups, nothing to remove, a refit without
            calibration, an unsupported, quantized, PEFT-wrapped or weightless model, calibration batches
            that do not run or whose activations are not finite. The model is then unchanged.
    """
    if refit is not None and refit not in refits.METHODS:
        raise ValueError(f"refit={refit!r} must be one of {', '.join(map(repr, refits.METHODS))}")
    if refit is not None and calibration is None:
        raise ValueError(f"refit={refit!r} needs calibration batches; give calibration, or leave refit out")
    layers = editable_layers(model)
    removed = checked_heads(heads, [len(layer.heads) for layer in layers])
    if not removed:
        raise ValueError("no head to remove: heads is empty")
    edits: list[Edit] = []
    numbers = []
    empty = set()
    for layer in layers:
        gone = removed.get(layer.index, set())
        kept = [head for head in layer.heads if head not in gone]
        if not kept:
            empty.add(layer.index)
            numbers.append((1, 1))
            edits += _stand_in(layer)
            continue
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
    change = Change(model, edits, numbers, empty)
    change.apply()
    if calibration is not None:
        refits.refit(change, calibration, method=refit or "output", stream=True)
    return model


def _stand_in(layer: AttentionLayer) -> list[Edit]:
    """One head of zeros instead of all heads of the layer."""
    edits = [blank_rows(getattr(layer, name), layer.head_dim, layer.rows(name)) for name in ("query", "key", "value")]
    return [*edits, blank_columns(layer.output, layer.head_dim)]


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
