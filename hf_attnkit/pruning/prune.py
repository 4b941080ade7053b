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

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.pruning.prune_any import prune_discovered
from hf_attnkit.refitting.options import RefitOptions, listed, refit_options


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
    remaining heads are counted again. A different number per layer is fine; such a model reloads with
    `load_pretrained`. An optimizer made before holds the old
    parameters and changes nothing any more: make it after. `last_change(model)` says what the pruning did.

    Args:
        model: any model with attention; changed in place. What belongs to its heads is found by running it.
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
    return prune_discovered(model, heads, probe, batches, options)
