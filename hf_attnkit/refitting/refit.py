"""Walk through a changed model and the untouched one, layer by layer from the bottom, and fit each layer.

Each layer is fitted on what the refitted layers below give it: all layers in one pass measured more than twice the
perplexity (see docs/conversion.md). The models do not start again for each layer (see `walk`), so the whole refit takes
about three forward passes of each. What is fitted: `queries`, `outputs`, `head_scales`.

After pruning, as in Kwon et al. 2022 (arXiv 2204.09656), the target is the residual stream: with x_t the stream before
the attention, y_t what the attention puts out and a prime for the untouched model, the attention should put out
(x'_t + y'_t) - x_t, so that a layer also makes up for what those below it lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.progress import progress_bar
from hf_attnkit.editing import projections
from hf_attnkit.editing.change import MadeChange
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.batches import real_tokens, to_device
from hf_attnkit.observing.walk import Walk
from hf_attnkit.refitting.head_scales import scaled
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.outputs import OutputSums, solve
from hf_attnkit.refitting.queries import attention_at, can_fit_queries, fit_layer_queries
from hf_attnkit.refitting.report import RefitReport, RefittedLayer


def refit_layers(
    model: PreTrainedModel,
    made: MadeChange,
    batches: Sequence[Mapping[str, Any]],
    options: RefitOptions,
    *,
    key_order: Sequence[Sequence[int]] | None = None,
    stream: bool = False,
) -> RefitReport:
    """Fit every layer of a changed model to what it was before.

    Args:
        made: gave every layer's output projection new parameters, and its query projection if "full" fits those.
        batches: model inputs, at least one; padding is left out.
        key_order: for "full": per layer, which key head of the untouched model is where now. Queries stay in layers
            whose queries are normed, and in those whose attention is no softmax (linear).
        stream: fit the residual stream after the attention, and not what the attention alone puts out; not for "full".

    Raises:
        ValueError: for batches that are no mappings, or activations that are not finite. The model is then partly
            fitted: the caller undoes the change.
    """
    inputs = [to_device(batch, model) for batch in batches]
    untouched, changed = ([Walk(model, batch) for batch in inputs] for _ in range(2))
    full, found = options.fits == "full", []
    assert not full or (key_order is not None and not stream)
    for layer in progress_bar(attention_layers(model), description="refit", unit="layer"):
        assert made.covers(layer.output) and (made.covers(layer.query) or not full), layer.name
        divergences: tuple[float | None, float | None] = None, None
        if key_order is not None and full and can_fit_queries(layer):
            with made.undone(), attention_at(model, layer) as run:
                calls = [run(walk).in_order(key_order[layer.index]) for walk in untouched]
            divergences = fit_layer_queries(model, layer, changed, inputs, calls, options.query_steps)
            targets = [call.output for call in calls]
        else:
            with made.undone():
                targets = [_target(walk, layer, stream) for walk in untouched]
        sums = OutputSums(layer.output)
        for batch, walk, target in zip(inputs, changed, targets, strict=True):
            if stream:
                target = target - walk.before(layer.index)
            heads, output = walk.seen(layer.index, layer.output)
            sums.add(*(real_tokens(x, batch) for x in (heads, output, target)))
        if not sums.is_finite():
            raise ValueError(
                f"layer {layer.index}: attention outputs contain NaN or infinity; run the model in bfloat16 or "
                "float32 and look for a batch that breaks it"
            )
        if options.fits == "scale":
            weight, bias = scaled(sums, layer.output, layer.head_dim, options.ridge)
        else:
            weight, bias = solve(sums, layer.output, options.ridge)
        projections.apply(projections.Edit(layer.output, weight, bias))
        found.append(RefittedLayer(layer.index, *divergences, sums.error_now(), sums.error_of(layer.output)))
    return RefitReport(options.fits, sums.num_tokens, tuple(found))


def _target(walk: Walk, layer: AttentionLayer, stream: bool) -> Tensor:
    """What the untouched model has after the attention: its output, or the residual stream with it."""
    output = walk.seen(layer.index, layer.output)[1]
    return output + walk.before(layer.index) if stream else output
