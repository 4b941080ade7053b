"""`prune_heads`: remove attention heads physically, which Transformers v5 no longer does.

A head is removed with its rows of the query projection and its columns of the output projection;
its key and value rows go when no query head of its group is left. In grouped layers Transformers
needs equally many query heads in every remaining group:

    groups of 4          q q q q | q q q q      possible: a whole group
                         q q . . | . q q .      possible: equally many in each
                         q q q . | q q q q      refused: unequal groups

A layer that loses all of its heads keeps a stand-in of one head that adds nothing; see `models.without_heads`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.editing.change import Change
from hf_attnkit.editing.in_table import by_number, cut_by_table, proof_of_removal
from hf_attnkit.editing.last_change import record_change
from hf_attnkit.editing.projections import Edit, blank_columns, blank_rows, keep_columns, keep_rows
from hf_attnkit.models.cache_size import cache_bytes_per_token
from hf_attnkit.models.layers import AttentionLayer, attention_layers, editable_layers
from hf_attnkit.pruning.prune_any import prune_discovered
from hf_attnkit.pruning.report import PruningReport
from hf_attnkit.pruning.select import checked_heads
from hf_attnkit.refitting.options import RefitOptions, listed, refit_options
from hf_attnkit.refitting.refit import refit_layers
from hf_attnkit.refitting.report import RefitReport


@plain_mode()
def prune_heads(
    model: PreTrainedModel,
    heads: Mapping[Any, Iterable[int]],
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    refit: str | bool | RefitOptions | None = None,
    probe: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Remove attention heads physically: the projections become smaller.

    Numbers of heads and layers are those of the model as it is, so after one pruning the
    remaining heads are counted again. A different number per layer is fine; such a model is saved
    with `per_layer_config` and reloads with `load_pretrained`. An optimizer made before holds the old
    parameters and changes nothing any more: make it after. `last_change(model)` says what the pruning did.

    Args:
        model: any model with attention; changed in place. What belongs to its heads is found by running it, and for
            some types of models known from a table.
        heads: `{layer: [query head, ...]}` to remove, as from `select_heads`; a layer by its number,
            cross-attention last, or by the path of the module that attends (`"model.layers.3.self_attn"`). A layer may
            lose all of its heads: only the bias of the output projection is left, and in place of its heads it keeps
            one of zeros, without which Transformers' classes do not run.
        calibration: batches of model inputs for the refit; no labels, no training.
        refit: what is fitted afterwards, so that the residual stream is after each attention what it is in the
            untouched model: "output" (the output projections; the default where calibration is given), "scale" (one
            factor per head, multiplied into the output projection: Kwon et al. 2022, the published baseline) or
            "none"; or `RefitOptions`, which say more. Some sequences are held out: a refit that brings the model's
            outputs on them further from the untouched model's is not kept, see `last_change`. "full" and "descent" are
            not defined here: they fit queries to keys that changed. Where the residual stream cannot be told (something
            is done to the attention's output before it is added), the attention's own output is fitted.
        probe: small inputs for `model(**probe)`, under which every attention runs; by default they are made. The
            pruned model is proven on them: its outputs are those of the untouched one with these heads zeroed.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: a layer or head out of range or named twice, unequal groups, nothing to remove, a refit without
            calibration, calibration without a refit, an unsupported, quantized, PEFT-wrapped or weightless model,
            calibration batches that do not run or whose activations are not finite. The model is then unchanged.
    """
    options = refit_options(refit, default="output", batches=calibration is not None)
    word = options.fits
    if word in ("full", "descent"):
        raise ValueError(
            f"refit={refit!r} fits queries to keys that a conversion merged; pruning leaves the keys of the heads that "
            "stay as they are: give refit='output' or 'scale'"
        )
    if word == "none" and calibration is not None:
        raise ValueError(f"refit={refit!r} looks at no data, so calibration would have no effect; leave one out")
    batches = [] if calibration is None else listed(calibration)
    if not cut_by_table(model):
        return prune_discovered(model, heads, probe, batches, options)
    layers = editable_layers(model)
    removed = checked_heads(by_number(model, heads, layers), [len(layer.heads) for layer in layers])
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
        elif word != "none":
            # What it gets changes with the layers below, so its output is fitted too.
            edits.append(keep_columns(layer.output, kept, layer.head_dim))
    bytes_before = cache_bytes_per_token(model)
    change = Change(model, edits, numbers, empty)
    found: RefitReport | None = None
    proof = proof_of_removal(model, layers, removed, probe)
    with change.made() as made:
        if problem := proof.difference():
            raise ValueError(f"{problem}; the model is unchanged")
        if word != "none":
            found = refit_layers(model, attention_layers(model), made, batches, options, stream=True)
    before = [(len(layer.heads), layer.num_key_value_heads if layer.heads else 0) for layer in layers]
    after = [(0, 0) if layer.index in empty else pair for layer, pair in zip(layers, numbers, strict=True)]
    removed_heads = {layer: tuple(sorted(gone)) for layer, gone in sorted(removed.items())}
    record_change(
        model,
        PruningReport(tuple(before), tuple(after), removed_heads, found, bytes_before, cache_bytes_per_token(model)),
    )
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
