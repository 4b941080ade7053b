"""`swap_attention`: run another kind of attention in a model's layers, and fit the output projections to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention.choose_kinds import Spec, Where
from hf_attnkit.attention.swap import Swap, swapped
from hf_attnkit.common.state import plain_mode
from hf_attnkit.common.text_table import text_table
from hf_attnkit.editing import projections
from hf_attnkit.editing.last_change import ChangeReport, record_change
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.models.whole import searched_once
from hf_attnkit.refitting import report as reports
from hf_attnkit.refitting.options import RefitOptions, listed, refit_options
from hf_attnkit.refitting.refit import refit_layers
from hf_attnkit.refitting.report import RefitReport, refit_line

FITS = ("none", "output", "scale")


def swap_attention(
    model: PreTrainedModel,
    kind: Spec | Mapping[Where, Spec],
    *,
    layers: Iterable[Where] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    refit: str | bool | RefitOptions | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Run another kind of attention in the model's layers.

    The swap is proved by two forward passes over a few tokens (an image, features): each layer must have run its new
    kind, and give what plain softmax attention gives under that kind's pattern, see `proof.py`. Otherwise the model is
    restored and an error raised.

    Args:
        model: any model, or a part of one, that calls Transformers' attention interface; changed in place. Where no
            inputs can be made for it, `set_probe` says some. Layers of a part are counted within it; what they run is
            noted in the config that is saved, the whole's where the part has none of its own.
        kind: a name of `available_attentions()`, or a mapping `{layer: name or (name, options)}`; a layer is its number
            or the path of the module that attends.
        layers: with one name, the layers to swap; by default all that it makes sense for: kinds that
            need queries and keys of one sequence leave cross-attention out. Other layers keep what
            they run. Layers are numbered through encoder self-attention, decoder self-attention,
            decoder cross-attention.
        calibration: batches of model inputs for a refit; no labels, no training. Such lengths as are met in use: a
            window hides nothing of shorter texts.
        refit: what is fitted afterwards, so that the residual stream is after each attention what it was before the
            swap: "output" (the output projections; the default where calibration is given), "scale" (one factor per
            head) or "none"; or `RefitOptions`. Some sequences are held out: a refit that brings the model's outputs on
            them further from what they were is not kept, see `last_change`. Queries are not fitted: what a kind does
            not see, no query brings back.
        options: the kind's options, for example `window=64`; with a mapping they are in the mapping.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: unknown kind or option, layer out of range, a model whose attention does not go through
            Transformers' attention interface, a swap that is not what it should be, a refit without calibration,
            calibration without a refit, or batches that do not run. The model is then unchanged.
    """
    chosen = refit_options(refit, default="output", batches=calibration is not None)
    if chosen.fits not in FITS:
        raise ValueError(f"refit={refit!r} fits queries, which see no key that a kind hides: give one of {FITS}")
    if chosen.fits == "none" and calibration is not None:
        raise ValueError(f"refit={refit!r} looks at no data, so calibration would have no effect; leave one out")
    batches = [] if calibration is None else listed(calibration)
    with plain_mode(), searched_once(), swapped(model, kind, layers, options) as swap:
        if chosen.fits != "none":
            _refit(model, swap, batches, chosen)
    return model


@dataclass(frozen=True)
class SwapReport(ChangeReport):
    """What a swap with a refit did; prints as a table.

    Attributes:
        kinds: what each layer runs.
        refit: what the refit reached.
    """

    kinds: tuple[str, ...]
    refit: RefitReport

    def __str__(self) -> str:
        reached = self.refit.cells()
        rows: list[tuple[str, ...]] = [("layer", "runs", *reports.HEADINGS)]
        rows += [(str(index), kind, *reached.get(index, reports.BLANK)) for index, kind in enumerate(self.kinds)]
        return f"{text_table(rows)}\n{refit_line(self.refit)}"


class _Made:
    """The swap as a refit sees it: what was changed, and how to run the model as it was."""

    def __init__(self, swap: Swap, outputs: list[nn.Linear]) -> None:
        self._swap = swap
        self._old = [projections.present(each) for each in outputs]

    def covers(self, linear: nn.Linear) -> bool:
        return any(edit.linear is linear for edit in self._old)

    def undo(self) -> None:
        """Give the output projections back; what runs is put back by the swap itself."""
        for edit in self._old:
            projections.apply(edit)

    @contextmanager
    def undone(self) -> Iterator[None]:
        now = [projections.present(edit.linear) for edit in self._old]
        self.undo()
        try:
            with self._swap.undone():
                yield
        finally:
            for edit in now:
                projections.apply(edit)


def _refit(model: PreTrainedModel, swap: Swap, batches: list[Mapping[str, Any]], options: RefitOptions) -> None:
    layers = attention_layers(model)
    made = _Made(swap, list(dict.fromkeys(layer.output for layer in layers if layer.output is not None)))
    try:
        found = refit_layers(model, layers, made, batches, options, stream=True)
    except BaseException:
        made.undo()
        raise
    heads = tuple((layer.num_heads, layer.num_key_value_heads) for layer in layers)
    own = {id(layer.module): str(kind) for layer, kind in zip(swap.layers, swap.after, strict=True)}
    record_change(model, SwapReport(heads, heads, tuple(own[id(layer.module)] for layer in layers), found))
