"""What a refit fits, in the words that conversion and pruning share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_attnkit.common.checks import choice, integer, number
from hf_attnkit.refitting.token_weights import TOKEN_WEIGHTS

# What each word fits; `True` and `False`, the older spellings, are "full" and "none".
REFITS = {
    "none": "nothing",
    "output": "the output projections",
    "full": "the query projections, then the output projections",
    "descent": 'as "full", then queries, keys, values and outputs together, by gradient descent on the layer\'s error',
    "scale": "one factor for each head, multiplied into the output projection (Kwon et al. 2022)",
}


@dataclass(frozen=True)
class RefitOptions:
    """A refit in more detail than its word: give one as `refit`, `refit=RefitOptions("output", ridge=0.1)`.

    Attributes:
        fits: a word of `REFITS`.
        ridge: how firmly output projections, or factors, keep to what they are: a share of the mean diagonal of their
            Gram matrix; at least 0. By default each layer's own, by cross-validation over the calibration's sequences.
        query_steps: steps of conjugate gradients for each query projection; at most so many, where sequences held out
            tell when to stop.
        descent_passes: over the calibration, of a "descent"; at most so many count, where sequences held out tell.
        token_weights: "uniform": all tokens count alike. "relative": each counts by the inverse square of its residual
            stream, which is what pruning and swaps fit: so the next layer's norm reads an error. Conversions refuse it;
            in layers where the stream cannot be told all count alike. "gradient": the fit of output projections is
            measured by what each token's attention does to the outputs of the untouched model, which takes a backward
            pass on each batch (the memory of a training step without gradients of parameters), and counts tokens so
            where that loses less unseen; queries are fitted so. A model that has no gradient is fitted with all tokens
            alike. By default "relative" after pruning and swaps in layers of causal self-attention through
            Transformers' attention interface, where a few tokens are far larger than all others; else "uniform".
        held_out: share of the calibration's sequences that nothing is fitted to. The model's outputs on them are
            compared with the untouched model's, and a refit with which they are further off, by more than the
            standard error of the difference, is not kept. With 0, or a single sequence, there is no such comparison.
        beginnings: single tokens of the calibration that a decoder is fitted to as texts of their own, so that it is
            right at the first token of other texts than a few: at most so many with the first tokens of the sequences,
            and at most a 32nd of the tokens. 0: none.
    """

    fits: str
    ridge: float | None = None
    query_steps: int = 6
    descent_passes: int = 6
    token_weights: str | None = None
    held_out: float = 0.1
    beginnings: int = 256

    def __post_init__(self) -> None:
        choice(self.fits, "refit", REFITS)
        if self.ridge is not None:
            number(self.ridge, "ridge", minimum=0)
        integer(self.query_steps, "query_steps", minimum=0)
        integer(self.descent_passes, "descent_passes", minimum=0)
        if self.token_weights is not None:
            choice(self.token_weights, "token_weights", TOKEN_WEIGHTS)
        number(self.held_out, "held_out", minimum=0, below=1)
        integer(self.beginnings, "beginnings", minimum=0)
        unread = {
            "none": tuple(field.name for field in fields(self) if field.name != "fits"),
            "full": ("descent_passes",),
            "descent": (),
        }
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name in unread.get(self.fits, ("query_steps", "descent_passes")) and given != field.default:
                raise ValueError(
                    f"{field.name}={given!r} has no effect on a refit of {REFITS[self.fits]} ({self.fits!r}); leave it "
                    "out, or give another refit"
                )


def refit_options(
    refit: str | bool | RefitOptions | None, *, default: str, batches: bool, given: str = "none"
) -> RefitOptions:
    """The refit that is meant.

    Args:
        refit: a word of `REFITS`, `True` or `False`, `RefitOptions`, or `None` for the default.
        default: the word that `None` means where there are batches; "none" without.
        batches: whether there are calibration batches, which a refit runs.
        given: what there is instead, for the message.

    Raises:
        ValueError: for another word, or a refit without batches.
    """
    if refit is None:
        return RefitOptions(default if batches else "none")
    if isinstance(refit, RefitOptions):
        options = refit
    elif isinstance(refit, bool):
        options = RefitOptions("full" if refit else "none")
    else:
        options = RefitOptions(choice(refit, "refit", REFITS))
    if options.fits != "none" and not batches:
        raise ValueError(
            f"refit={refit!r} needs calibration batches, and calibration is {given}; give batches of model inputs, or "
            "leave refit out"
        )
    return options


def require_no_stream(options: RefitOptions) -> None:
    """Raise `ValueError` for a conversion's refit that counts tokens by the residual stream, which it does not fit."""
    if options.token_weights == "relative":
        raise ValueError(
            "token_weights='relative' counts tokens by the residual stream, which pruning and swaps fit; a conversion "
            "fits what the attention puts out: leave it out"
        )


def listed(calibration: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The batches of a refit, which every layer runs; raises `ValueError` if there are none."""
    batches = list(calibration)
    if not batches:
        raise ValueError("refit needs calibration batches, and got none (an iterator is spent after one use)")
    return batches
