"""What a refit reached, layer by layer, and what of it was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

HEADINGS = ("KL of attention (nats)", "error of outputs", "cross-validated", "ridge", "weighted", "descent")
BLANK = ("",) * len(HEADINGS)
# A refit is told to have enough tokens where its error is this much above what it would be with any number of them.
EXCESS = 0.1
NO_GAIN = 0.01


@dataclass(frozen=True)
class RefittedLayer:
    """Errors are of the same changed model, with the layers below refitted; lower is better, 0 is exact.

    Attributes:
        kl_before, kl_after: mean Kullback-Leibler divergence in nats of the layer's attention from the untouched
            model's, over heads and real tokens, before and after the queries were fitted; `None` where they were not.
            On the sequences held out, where there are some.
        error_before, error_after: sum of squared errors over the real tokens that were fitted, as a share of the
            target's sum of squares, before and after the output projection was fitted (the queries fitted already).
            The target is what the attention should put out: what the untouched model's does, or, after pruning, what
            brings the residual stream to where the untouched model has it.
        unseen_before, unseen_after: the same by cross-validation: each fold of sequences under a fit to the others.
            `None` for a ridge that was given.
        ridge: a share of the mean diagonal of the Gram matrix; infinity where the bias alone was fitted; `None` where
            the projection stays as it is, since nothing helps.
        share: in which the fit counted tokens by what they do to the model's outputs, of 0 (all alike) to 0.9; `None`
            where that is not asked for.
        inputs: of the output projection.
        descent: the error before and after the descent, which follows, on the sequences held out where there are some;
            `None` without one.

    With `RefitReport.token_weights` "relative" fit and errors count tokens by the inverse square of their stream. With
    "gradient" errors and the divergence count them by 0.9 of what they do to the model's outputs, the rest alike.
    """

    index: int
    kl_before: float | None
    kl_after: float | None
    error_before: float
    error_after: float
    unseen_before: float | None
    unseen_after: float | None
    ridge: float | None
    share: float | None
    inputs: int
    descent: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeldOut:
    """The model's final outputs on sequences that nothing was fitted to.

    Attributes:
        num_sequences: held out.
        errors: how far the outputs are from the untouched model's, 0 is equal: "none" of the model as the change alone
            left it, and of each refit that was tried.
        kept: what the model has now: the refit, unless another was closer by more than the standard error of the
            difference.
        is_divergence: whether errors are the mean Kullback-Leibler divergence of the words in nats, as of logits over a
            vocabulary; else squared differences, relative to the variance of the untouched model's outputs, and of a
            model that has both the sum.
    """

    num_sequences: int
    errors: Mapping[str, float]
    kept: str
    is_divergence: bool


@dataclass(frozen=True)
class RefitReport:
    """
    Attributes:
        fits: the word of `REFITS`.
        num_tokens: real tokens that were fitted.
        token_weights: "gradient", "relative" (in some layer at least) or "uniform".
        layers: from the bottom up, as they were fitted.
        held_out: `None` where nothing was held out; the refit is then kept.
        num_beginnings: how many of the tokens are single ones, further beginnings of texts; see `beginnings`.
    """

    fits: str
    num_tokens: int
    token_weights: str
    layers: tuple[RefittedLayer, ...]
    held_out: HeldOut | None
    num_beginnings: int = 0

    @property
    def kept(self) -> str:
        """What the model has: the word of `REFITS`, "queries" or "none"."""
        return self.fits if self.held_out is None else self.held_out.kept

    @property
    def num_tokens_needed(self) -> int | None:
        """About how many tokens would bring the error within a tenth of what no number of them could beat; the median
        of the layers. `None` where that cannot be told.

        The error in the sample is as far below the error of any number of tokens as the cross-validated one is above
        it, and both distances fall with the number.
        """
        needed = []
        for layer in self.layers:
            if layer.unseen_after is None or layer.ridge is None:
                continue
            limit, excess = layer.unseen_after + layer.error_after, layer.unseen_after - layer.error_after
            if limit > 0:
                needed.append(max(self.num_tokens * excess / (EXCESS * limit), 1.0))
        return round(median(needed)) if needed else None

    @property
    def warning(self) -> str:
        """Why the calibration is too small to help, or nothing."""
        before, after = (
            sum(unseen or 0.0 for unseen in part)
            for part in zip(*((layer.unseen_before, layer.unseen_after) for layer in self.layers), strict=True)
        )
        inputs = max(layer.inputs for layer in self.layers)
        if self.kept == "none":
            return "the refit brought the outputs further off on sequences held out, so none is kept"
        # Tokens of large norm, as a decoder's first, can hide in the layers' errors what the others gain.
        errors = {} if self.held_out is None else self.held_out.errors
        is_nearer = bool(errors) and errors[self.kept] < (1 - NO_GAIN) * errors["none"]
        if not is_nearer and before > 0 and after > (1 - NO_GAIN) * before:
            return "the refit gains nothing on sequences that it does not see"
        if self.num_tokens < inputs and self.fits != "scale":
            return f"{self.num_tokens:,} tokens were fitted to output projections of {inputs:,} inputs"
        return ""

    def cells(self) -> Mapping[int, tuple[str, ...]]:
        """For each layer's row of a table, under `HEADINGS`."""
        return {
            layer.index: (
                _arrow(layer.kl_before, layer.kl_after),
                _arrow(layer.error_before, layer.error_after),
                _arrow(layer.unseen_before, layer.unseen_after),
                "as it was" if layer.ridge is None else f"{layer.ridge:.3g}",
                "" if layer.ridge is None or layer.share is None else f"{layer.share:.3g}",
                "" if layer.descent is None else _arrow(*layer.descent),
            )
            for layer in self.layers
        }


def refit_line(report: RefitReport | None) -> str:
    """What a refit did and what of it was kept, or that there was none; in lines."""
    if report is None:
        return "no refit"
    line = f"refit {report.fits} on {report.num_tokens:,} tokens"
    if report.num_beginnings:
        line += f" with {report.num_beginnings:,} single ones as beginnings of texts"
    if (needed := report.num_tokens_needed) is not None and needed > report.num_tokens:
        line += f", of about {needed:,} that it can use"
    if report.held_out is not None:
        tried = ", ".join(f"{name} {error:.3g}" for name, error in report.held_out.errors.items())
        measure = "divergence of words (nats)" if report.held_out.is_divergence else "distance of outputs"
        line += f"\nsequences held out: {report.held_out.num_sequences:,}; {measure}: {tried}"
        line += f"; kept: {report.kept}"
    return line + (f"\ntoo little calibration: {report.warning}" if report.warning else "")


def _arrow(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.3g} -> {after:.3g}"
