"""Walk through a changed model and the untouched one, layer by layer from the bottom, and fit each layer.

Each layer is fitted on what the refitted layers below give it: all layers in one pass measured more than twice the
perplexity (see docs/conversion.md). The models do not start again for each layer (see `walk`), so the whole refit takes
about three forward passes of each. What is fitted: `queries`, `outputs`, `head_scales`, `descent`; how firmly: `ridge`;
what of it stays: `guard`.

All sequences are fitted, those too on which the guard compares. What it compares is a model of its own, fitted with the
same ridges to the others, on a walk of its own: a layer makes up for what those below it lost, so one that was solved
on layers fitted to everything does not go with layers that were not (see docs/conversion.md).

After pruning, as in Kwon et al. 2022 (arXiv 2204.09656), the target is the residual stream: with x_t the stream before
the attention, y_t what the attention puts out and a prime for the untouched model, the attention should put out
(x'_t + y'_t) - x_t, so that a layer also makes up for what those below it lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_attnkit.common.progress import progress_bar
from hf_attnkit.editing import projections
from hf_attnkit.models.discovery import require_gradients
from hf_attnkit.models.layers import AttentionLayer, in_running_order, weight_of
from hf_attnkit.observing.attention_calls import require_shown
from hf_attnkit.observing.batches import real_mask, to_device
from hf_attnkit.observing.rows import rows_of, set_aside
from hf_attnkit.observing.walk import Seen, Walk, can_skip
from hf_attnkit.refitting.beginnings import beginnings
from hf_attnkit.refitting.descent import Aim, descend
from hf_attnkit.refitting.folds import Folds
from hf_attnkit.refitting.guard import Guard
from hf_attnkit.refitting.head_scales import choose_scale_ridge, scaled
from hf_attnkit.refitting.options import RefitOptions
from hf_attnkit.refitting.outputs import OutputSums, solve
from hf_attnkit.refitting.queries import NotLinearError, Watched, attention_at, can_fit_queries, fit_layer_queries
from hf_attnkit.refitting.report import RefitReport, RefittedLayer
from hf_attnkit.refitting.ridge import MEASURED, Fold, Ridge, choose_ridge, num_folds, total
from hf_attnkit.refitting.token_weights import (
    NoGradientError,
    floor_of,
    gradient_norms,
    relative_weights,
    weights_of,
)

logger = logging.get_logger(__name__)


class Made(Protocol):
    """A change that was made: knows what the model was before."""

    def covers(self, linear: nn.Linear, /) -> bool:
        """Whether undoing brings back this module's old parameters."""

    def undo(self) -> None:
        """Put the model back as it was."""

    def undone(self) -> AbstractContextManager[None]:
        """The model as it was, while the block runs; then with the change again, as it is now."""


def refit_layers(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    made: Made,
    batches: Sequence[Mapping[str, Any]],
    options: RefitOptions,
    *,
    key_order: Sequence[Sequence[int]] | None = None,
    stream: bool = False,
) -> RefitReport:
    """Fit every layer of a changed model to what it was before, and take that back if it harms on sequences held out.

    Args:
        layers: of the changed model.
        made: gave every layer's output projection new parameters, and its query projection for "full" and "descent".
        batches: model inputs, at least one; padding is left out. Some of their sequences are held out.
        key_order: for "full" and "descent": per layer, which key head of the untouched model is where now. Queries stay
            in layers of which `can_fit_queries` does not hold, or whose queries prove to be no linear map of the input.
        stream: fit the residual stream after the attention, and not what the attention alone puts out; not for these.
            Where it cannot be told (something is done to the attention's output before it is added), the attention's
            own output is fitted.

    Layers whose output projection cannot be told stay as they are.

    Raises:
        ValueError: for batches that are no mappings, activations that are not finite, or a model of which no output
            projection can be told. The model is then partly fitted: the caller undoes the change.
    """
    fitted = [layer for layer in in_running_order(layers) if layer.output is not None]
    if not fitted:
        raise ValueError(
            f"{layers[0].name}: no matrix product takes its heads' outputs, so there is none to fit; give refit='none'"
        )
    layers = fitted
    _require_unshared(model, layers)
    if options.fits == "descent":
        require_gradients(model)
    inputs = [to_device(batch, model) for batch in batches]
    aside = set_aside(inputs, options.held_out)
    held_out = [rows_of(batch, rows) for batch, rows in zip(inputs, aside, strict=True) if rows]
    further = beginnings(layers, inputs, aside, options.beginnings)
    if further is not None:
        inputs.append(further)
        aside.append([])
    with made.undone():
        guard = Guard(model, held_out) if held_out else None
        norms = _gradient_norms(model, layers, inputs) if options.token_weights == "gradient" else None
    full = options.fits in ("full", "descent")
    assert not full or (key_order is not None and not stream)
    assert stream or options.token_weights != "relative"
    if guard is not None:
        inner = [each for layer in layers for each in _projections(layer) if each is not layer.output and full]
        guard.before(layers, inner, alone=options.fits == "full")
    skips = can_skip(model, layers, inputs[0], stream=stream)
    queried: set[int] = set()
    stock: list[AttentionLayer] = []
    if full and not any(layer.refusal for layer in layers):
        queried = {layer.index for layer in layers if can_fit_queries(layer)}
    if queried:
        stock = require_shown(model)
        with made.undone():
            require_shown(model)
    untouched, changed, compared = ([Walk(model, batch, layers, skips=skips) for batch in inputs] for _ in range(3))
    found: list[RefittedLayer] = []
    without: list[projections.Edit] = []
    unknown: list[str] = []
    num_tokens, counted = 0, "uniform" if norms is None else "gradient"
    for layer in progress_bar(layers, description="refit", unit="layer"):
        weights = None if norms is None else _weights(layer, norms.pop(layer.index), inputs)
        divergences: tuple[float | None, float | None] = None, None
        assert made.covers(layer.output), layer.name
        kinds, extra = 1 if weights is None else 2, (2 if held_out else 0) + (further is not None)
        count = 1 if options.ridge is not None else num_folds(layer.output, kinds, aside=extra)
        folds = Folds(inputs, count, aside, further)
        if key_order is not None and layer.index in queried:
            assert made.covers(layer.query), layer.name
            with made.undone(), attention_at(model, layer, stock) as run:
                calls = [run(walk).in_order(key_order[layer.index]) for walk in untouched]
            counts = [None] * len(calls) if weights is None else weights
            apart = [folds.is_aside(number, call.output.shape[:-1]) for number, call in enumerate(calls)]
            watched = [Watched(*each) for each in zip(changed, inputs, calls, counts, apart, strict=True)]
            with suppress(NotLinearError):  # the queries stay
                divergences = fit_layer_queries(model, layer, stock, watched, options.query_steps)
            targets = [Seen(call.output, call.output) for call in calls]
        else:
            with made.undone():
                targets = [_seen(walk, layer, stream) for walk in untouched]
        floor = _floor(layer, targets, inputs, options)
        if floor:
            counted = "relative"
        elif options.token_weights == "relative":
            unknown.append(layer.name)
        sums = _summed(layer, folds, changed, targets, inputs, weights, stream, floor)
        others: Sums | None = None
        # The lowest layer has none below it, and those of a descent are the ones that are compared.
        if held_out and without and options.fits != "descent":
            with projections.applied(without):
                those = Folds(inputs, 1, aside, further)
                others = _summed(layer, those, compared, targets, inputs, weights, stream, floor)
        fit, edit = _fit_output(layer, sums, others, options, divergences)
        if options.fits == "descent":
            # Outputs start from what is not fitted to the sequences that the passes are chosen on.
            projections.apply(edit)
            aims = _aims(layer, folds, changed, targets, inputs, weights)
            modules = [each for each in _projections(layer) if made.covers(each)]
            fit = replace(fit, descent=descend(model, layer, modules, aims, options.descent_passes))
            edit = projections.present(layer.output)
        found.append(fit)
        without.append(edit)
        num_tokens = sum(own.alike.num_tokens for own in (*sums.others, *sums.aside))
    if unknown:
        logger.warning(
            f"all tokens count alike in the refit of {', '.join(unknown)}: the residual stream, which "
            "token_weights='relative' asks for, cannot be told there"
        )
    held = None if guard is None else guard.keep(options.fits, without)
    num_beginnings = 0 if further is None else len(further["input_ids"])
    report = RefitReport(options.fits, num_tokens, counted, tuple(found), held, num_beginnings)
    if report.warning:
        logger.warning(f"the refit has too little calibration: {report.warning}; give more sequences")
    return report


class Sums(NamedTuple):
    """Over each fold of the sequences, over those held out, and over the beginnings; the last two if there are some."""

    folds: list[Fold]
    aside: list[Fold]
    further: list[Fold]

    @property
    def others(self) -> list[Fold]:
        """All but what is held out."""
        return [*self.folds, *self.further]


def _summed(
    layer: AttentionLayer,
    folds: Folds,
    walks: Sequence[Walk],
    targets: Sequence[Seen],
    inputs: Sequence[Mapping[str, Any]],
    weights: Sequence[Tensor] | None,
    stream: bool,
    floor: float,
) -> Sums:
    """What the changed model's layer gets and gives, and what it should give, summed over tokens."""

    def empty(count: int) -> list[Fold]:
        return [
            Fold(OutputSums(layer.output), None if weights is None else OutputSums(layer.output)) for _ in range(count)
        ]

    sums = Sums(empty(folds.count), empty(folds.has_aside), empty(folds.has_further))
    numbered = [*enumerate(sums.folds), *((folds.count, own) for own in sums.aside)]
    numbered += [(folds.count + 1, own) for own in sums.further]
    for number, (walk, target) in enumerate(zip(walks, targets, strict=True)):
        now = _seen(walk, layer, stream)
        wanted, counts = target.output, None
        if now.stream is not None and target.stream is not None:
            wanted = wanted + target.stream - now.stream
            if floor:
                counts = relative_weights(now.stream + now.output, target.stream + target.output, floor)
        assert counts is not None or not floor
        real = _real(layer, now.taken, inputs[number])
        numbers = folds.of(number, real.shape, calls=_calls(layer)).to(real.device)
        for fold, own in numbered:
            those = real & (numbers == fold)
            tokens = now.taken[those], now.output[those], wanted[those]
            own.alike.add(*tokens, None if counts is None else counts[those])
            if own.seen is not None and weights is not None:
                own.seen.add(*tokens, weights[number][those])
    return sums


def _floor(
    layer: AttentionLayer, targets: Sequence[Seen], inputs: Sequence[Mapping[str, Any]], options: RefitOptions
) -> float:
    """The floor of weights by the residual stream; 0 where tokens do not count by it."""
    words = "relative" if options.token_weights is None and layer.attention.is_causal else options.token_weights
    if words != "relative":
        return 0.0
    streams = [target.stream + target.output for target in targets if target.stream is not None]
    if len(streams) < len(targets):
        return 0.0
    return floor_of(streams, [_real(layer, *each) for each in zip(streams, inputs, strict=True)])


def _projections(layer: AttentionLayer) -> list[nn.Linear]:
    """The layer's projections that are known, each once."""
    found = {id(each): each for each in (layer.query, layer.key, layer.value, layer.output) if each is not None}
    return list(found.values())


def _aims(
    layer: AttentionLayer,
    folds: Folds,
    walks: Sequence[Walk],
    targets: Sequence[Seen],
    inputs: Sequence[Mapping[str, Any]],
    weights: Sequence[Tensor] | None,
) -> list[Aim]:
    """What a descent looks at; sequences set aside count in the choice among its passes alone."""
    aims = []
    for number, (walk, target) in enumerate(zip(walks, targets, strict=True)):
        counts = _real(layer, target.output, inputs[number]).float()
        if weights is not None:
            counts = counts * weights[number].to(counts)
        aside = (folds.of(number, counts.shape, calls=_calls(layer)) == folds.count).to(counts)
        aims.append(Aim(walk, target.output, counts * (1 - aside), counts * aside))
    return aims


def _fit_output(
    layer: AttentionLayer,
    found: Sums,
    compared: Sums | None,
    options: RefitOptions,
    divergences: tuple[float | None, float | None],
) -> tuple[RefittedLayer, projections.Edit]:
    """Give the layer its new output projection, or leave it.

    Args:
        compared: of the model that is not fitted to what is held out; `None`: the same.

    Returns:
        What it reached, and what the projection would be that is not fitted to what is aside.
    """
    folds, others = found.folds, (found if compared is None else compared).others
    everything = [*found.others, *found.aside]
    sums, linear = total(fold.at(MEASURED) for fold in everything), layer.output
    if not sums.is_finite():
        raise ValueError(
            f"layer {layer.index}: attention outputs contain NaN or infinity; run the model in bfloat16 or "
            "float32 and look for a batch that breaks it"
        )
    scales, error = options.fits == "scale", sums.error_now()
    chosen: Ridge | None = None
    if options.ridge is None:
        if scales:
            tested, further = ([fold.at(MEASURED) for fold in part] for part in (folds, found.further))
            chosen = choose_scale_ridge(tested, linear, layer.value_head_dim, further)
        else:
            chosen = choose_ridge(folds, linear, found.further)
    ridge, share = (options.ridge, MEASURED) if chosen is None else (chosen.ridge, chosen.share)
    without = projections.present(linear)
    if ridge is not None:
        without, edit = (
            _fitted(layer, total(fold.at(share) for fold in part), ridge, scales=scales)
            for part in (others, everything)
        )
        projections.apply(edit)
    fit = RefittedLayer(
        layer.index, *divergences, error, sums.error_of(linear),
        None if chosen is None else chosen.before, None if chosen is None else chosen.after,
        ridge, None if folds[0].seen is None else share, weight_of(linear).shape[1],
    )  # fmt: skip
    return fit, without


def _fitted(layer: AttentionLayer, sums: OutputSums, ridge: float, *, scales: bool) -> projections.Edit:
    """The output projection that fits the sums."""
    linear = layer.output
    fitted = scaled(sums, linear, layer.value_head_dim, ridge) if scales else solve(sums, linear, ridge)
    return projections.Edit(linear, *fitted)


def _require_unshared(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` for an output projection whose parameters another module has too, which would not follow."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for layer in layers:
        for parameter in layer.output.parameters(recurse=False):
            if len(paths := owners[id(parameter)]) > 1:
                raise ValueError(
                    f"{layer.name}: a parameter of its output projection is shared by {' and '.join(paths)}, and a "
                    "refit would give each its own; give refit='none', or give each its own copy first"
                )


def _seen(walk: Walk, layer: AttentionLayer, stream: bool) -> Seen:
    """What the output projection takes and puts out, and the residual stream that this is added to."""
    return walk.seen(layer.index, layer.output, stream=stream)


def _real(layer: AttentionLayer, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Which activations are of real tokens; a module that is called several times has all calls in `x`."""
    mask = batch.get(layer.padding)
    if isinstance(mask, Tensor) and x.dim() > 2 and len(mask) and len(x) > len(mask.flatten(0, -2)):
        batch = {layer.padding: mask.flatten(0, -2).repeat(len(x) // len(mask.flatten(0, -2)), 1)}
    return real_mask(x, batch, layer.padding, layer.of_length)


def _gradient_norms(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], inputs: Sequence[Mapping[str, Any]]
) -> dict[int, list[Tensor]] | None:
    """See `token_weights`; `None` for a model that has no gradient."""
    try:
        return gradient_norms(model, layers, inputs)
    except NoGradientError as error:
        logger.warning(f"all tokens count alike in the refit: {error}")
        return None


def _weights(layer: AttentionLayer, norms: Sequence[Tensor], inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """What each token of each batch counts in the fit of this layer."""
    real = [_real(layer, norm[..., None], batch) for norm, batch in zip(norms, inputs, strict=True)]
    return weights_of(norms, real)


def _calls(layer: AttentionLayer) -> int:
    return layer.attention.calls
