"""Take back a refit that brings the model's outputs further from the untouched model's, on sequences held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.editing import projections
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.outputs import OutputDistance
from hf_attnkit.observing.rows import num_rows
from hf_attnkit.refitting.report import HeldOut


class Guard:
    """Made of the untouched model; then told of the changed one before it is fitted and after."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            batches: sequences that nothing is fitted to, on the model's device.
        """
        self._distance = OutputDistance(model, batches)
        self._num_sequences = sum(map(num_rows, batches))
        self._errors: dict[str, Tensor] = {}
        self._outputs: list[projections.Edit] = []
        self._queries: list[projections.Edit] = []

    def before(self, layers: Sequence[AttentionLayer], *, queries: bool) -> None:
        """Note the changed model as it is without a refit.

        Args:
            layers: of which the output projections will be fitted.
            queries: whether query projections will be too.
        """
        self._outputs = _present([layer.output for layer in layers])
        self._queries = _present([layer.query for layer in layers]) if queries else []
        self._errors["none"] = self._distance.now()

    def keep(self, fits: str) -> HeldOut:
        """Compare the fitted model with what it was before, and leave it as that where the fit did harm.

        Args:
            fits: the word of `REFITS` for what was fitted.
        """
        fitted = [_present([edit.linear for edit in part]) for part in (self._queries, self._outputs)]
        self._errors[fits] = self._distance.now()
        if self._queries:
            _apply(self._outputs)
            self._errors["queries"] = self._distance.now()
        kept = fits
        for other in self._errors:
            if _is_worse(self._errors[kept], self._errors[other]):
                kept = other
        _apply(fitted[0] if kept != "none" else self._queries)
        _apply(fitted[1] if kept == fits else self._outputs)
        errors = {name: float(each.mean()) for name, each in self._errors.items()}
        return HeldOut(self._num_sequences, errors, kept)


def _is_worse(errors: Tensor, others: Tensor) -> bool:
    """Whether errors `(positions,)` are larger, by more than the standard error of the mean difference.

    A few sequences in which an answer flips make up most of a distance, so that means over few say little.
    """
    difference = errors - others
    spread = difference.std() / len(difference) ** 0.5 if len(difference) > 1 else difference.new_zeros(())
    return not bool(difference.mean() <= spread)  # NaN is worse


def _present(modules: Sequence[nn.Module | None]) -> list[projections.Edit]:
    by_id = {id(module): module for module in modules if module is not None}
    return [projections.present(module) for module in by_id.values()]  # type: ignore[arg-type]


def _apply(edits: Sequence[projections.Edit]) -> None:
    for edit in edits:
        projections.apply(edit)
