"""What a refit reached, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HEADINGS = ("KL of attention (nats)", "error of outputs")


@dataclass(frozen=True)
class RefittedLayer:
    """Both errors are of the same changed model, with the layers below refitted; lower is better, 0 is exact.

    Attributes:
        kl_before, kl_after: mean Kullback-Leibler divergence in nats of the layer's attention from the untouched
            model's, over heads and real tokens, before and after the queries were fitted; `None` where they were not.
        error_before, error_after: sum of squared errors over the real tokens, as a share of the target's sum of
            squares, before and after the output projection was fitted (the queries fitted already). The target is
            what the attention should put out: what the untouched model's does, or, after pruning, what brings the
            residual stream to where the untouched model has it.
    """

    index: int
    kl_before: float | None
    kl_after: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class RefitReport:
    """
    Attributes:
        fits: the word of `REFITS`.
        num_tokens: real tokens that were looked at.
        layers: from the bottom up.
    """

    fits: str
    num_tokens: int
    layers: tuple[RefittedLayer, ...]

    def cells(self) -> Mapping[int, tuple[str, str]]:
        """For each layer's row of a table, under `HEADINGS`."""
        return {layer.index: (_kl(layer), _arrow(layer.error_before, layer.error_after)) for layer in self.layers}


def refit_line(report: RefitReport | None) -> str:
    """One line about a refit, or about there being none."""
    return "no refit" if report is None else f"refit {report.fits} on {report.num_tokens:,} tokens"


def _kl(layer: RefittedLayer) -> str:
    return "" if layer.kl_before is None or layer.kl_after is None else _arrow(layer.kl_before, layer.kl_after)


def _arrow(before: float, after: float) -> str:
    return f"{before:.3g} -> {after:.3g}"
