"""Take back a refit that brings the model's outputs further from the untouched model's, on sequences held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.editing import projections
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.outputs import OutputDistance
from hf_attnkit.refitting.report import HeldOut


class Guard:
    """Made of the untouched model; then told of the changed one before it is fitted and after."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            batches: sequences that nothing is fitted to, on the model's device.
        """
        self._distance = OutputDistance(model, batches)
        self._errors: dict[str, Tensor] = {}
        self._outputs: list[projections.Edit] = []
        self._inner: list[projections.Edit] = []
        self._alone = False

    def before(self, layers: Sequence[AttentionLayer], inner: Sequence[nn.Module] = (), *, alone: bool = False) -> None:
        """Note the changed model as it is without a refit.

        Args:
            layers: of which the output projections will be fitted.
            inner: projections before them that will be fitted too.
            alone: whether to compare these without the fitted outputs; they are then queries.
        """
        self._outputs = _present([layer.output for layer in layers])
        self._inner, self._alone = _present(inner), alone
        self._errors["none"] = self._distance.now()

    def keep(self, fits: str, without: Sequence[projections.Edit]) -> HeldOut:
        """Compare the fit with what the model was before, and leave the model as that where the fit did harm.

        Args:
            fits: the word of `REFITS` for what was fitted.
            without: output projections that are not fitted to these sequences, which are compared in the place of those
                that the model has.
        """
        fitted = [_present([edit.linear for edit in part]) for part in (self._inner, self._outputs)]
        _apply(without)
        self._errors[fits] = self._distance.now()
        if self._alone:
            _apply(self._outputs)
            self._errors["queries"] = self._distance.now()
        kept = fits
        for other in self._errors:
            if is_worse(self._errors[kept], self._errors[other], self._distance.counts):
                kept = other
        _apply(fitted[0] if kept != "none" else self._inner)
        _apply(fitted[1] if kept == fits else self._outputs)
        counts = self._distance.counts
        errors = {name: float(each.sum() / counts.sum()) for name, each in self._errors.items()}
        return HeldOut(self._distance.num_sequences, errors, kept, self._distance.is_divergence)


def is_worse(errors: Tensor, others: Tensor, counts: Tensor) -> bool:
    """Whether errors are larger, by more than the standard error of the difference of their means.

    A few sequences in which an answer flips make up most of a distance, so that means over few say little. The error
    is over sequences, or stretches of few, since positions of one are alike: that of a ratio of sums over clusters.

    Args:
        errors, others: `(parts,)`, each a sum over its positions.
        counts: `(parts,)`, how many these are.
    """
    number, difference = len(counts), errors - others
    mean = difference.sum() / counts.sum()
    spread = (difference - mean * counts).square().sum().sqrt() / counts.sum()
    if number > 1:
        spread = spread * (number / (number - 1)) ** 0.5
    return not bool(mean <= spread)  # NaN is worse


def _present(modules: Sequence[nn.Module | None]) -> list[projections.Edit]:
    by_id = {id(module): module for module in modules if module is not None}
    return [projections.present(module) for module in by_id.values()]  # type: ignore[arg-type]


def _apply(edits: Sequence[projections.Edit]) -> None:
    for edit in edits:
        projections.apply(edit)
