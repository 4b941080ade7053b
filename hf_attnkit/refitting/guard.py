"""Keep of a refit what brings the model's outputs closer to the untouched model's, on sequences held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
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
        self._errors: dict[str, float] = {}
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
        """Compare the fitted model with what it was before, and leave it as the better of them.

        Args:
            fits: the word of `REFITS` for what was fitted.
        """
        fitted = [_present([edit.linear for edit in part]) for part in (self._queries, self._outputs)]
        self._errors[fits] = self._distance.now()
        if self._queries:
            _apply(self._outputs)
            self._errors["queries"] = self._distance.now()
        # The first of equals, which is none; NaN is never less.
        kept = "none"
        for name, error in self._errors.items():
            if error < self._errors[kept]:
                kept = name
        _apply(fitted[0] if kept != "none" else self._queries)
        _apply(fitted[1] if kept == fits else self._outputs)
        return HeldOut(self._num_sequences, self._errors, kept)


def _present(modules: Sequence[nn.Module | None]) -> list[projections.Edit]:
    by_id = {id(module): module for module in modules if module is not None}
    return [projections.present(module) for module in by_id.values()]  # type: ignore[arg-type]


def _apply(edits: Sequence[projections.Edit]) -> None:
    for edit in edits:
        projections.apply(edit)
