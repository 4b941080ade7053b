"""What a conversion is predicted to lose, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_attnkit.common.text_table import text_table
from hf_attnkit.editing.last_change import ChangeReport
from hf_attnkit.refitting import report as refits
from hf_attnkit.refitting.report import RefitReport, refit_line


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part of a plan.

    Attributes:
        groups: the present key/value heads that each new one replaces.
        key_loss, value_loss: predicted share of the energy of scores and outputs that is lost, without a refit; 0 is
            exact, lower is better, see `conversion.predicted_loss`.
    """

    index: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    groups: tuple[tuple[int, ...], ...]
    key_loss: float
    value_loss: float


@dataclass(frozen=True)
class ConversionReport(ChangeReport):
    """What a conversion did; prints as a table.

    Attributes:
        method, key_method, grouping: how values and keys were merged, and which of them.
        num_tokens: of the calibration that predicted losses and "pca" look at; `None` without.
        layers: what was predicted.
        refit: what the refit reached; `None` without one.
        bytes_before, bytes_after: of the key/value cache per token, all layers.
    """

    method: str
    key_method: str
    grouping: str
    num_tokens: int | None
    layers: tuple[LayerPlan, ...]
    refit: RefitReport | None
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        line = summary(self.method, self.key_method, self.num_tokens, self.bytes_before, self.bytes_after)
        return f"{conversion_table(self.layers, self.refit)}\n{line}; {refit_line(self.refit)}"


def conversion_table(layers: Sequence[LayerPlan], refit: RefitReport | None = None) -> str:
    """One row for each layer."""
    reached = {} if refit is None else refit.cells()
    rows: list[tuple[str, ...]] = [("layer", "key/value heads", "groups", "key loss", "value loss", *refits.HEADINGS)]
    for layer in layers:
        present = sum(len(group) for group in layer.groups)
        groups = " ".join(",".join(map(str, group)) for group in layer.groups)
        losses = f"{layer.key_loss:.4f}", f"{layer.value_loss:.4f}"
        heads = f"{present} -> {layer.num_key_value_heads}"
        rows.append((str(layer.index), heads, groups, *losses, *reached.get(layer.index, refits.BLANK)))
    return text_table(rows)


def summary(method: str, key_method: str, num_tokens: int | None, bytes_before: int, bytes_after: int) -> str:
    """One line about a conversion."""
    keys = "" if key_method == method else f" (keys: {key_method})"
    data = "no calibration" if num_tokens is None else f"{num_tokens:,} calibration tokens"
    return f"method {method}{keys}, {data}; cache {bytes_before:,} -> {bytes_after:,} bytes per token"
