"""What a refit fits, in the words that conversion and pruning share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_attnkit.common.checks import choice, integer, number

# What each word fits; `True` and `False`, the older spellings, are "full" and "none".
REFITS = {
    "none": "nothing",
    "output": "the output projections",
    "full": "the query projections, then the output projections",
    "scale": "one factor for each head, multiplied into the output projection (Kwon et al. 2022)",
}


@dataclass(frozen=True)
class RefitOptions:
    """
    Attributes:
        fits: a word of `REFITS`.
        ridge: how firmly output projections, or factors, keep to what they are: a share of the mean diagonal of their
            Gram matrix.
        query_steps: steps of conjugate gradients for each query projection.
    """

    fits: str
    ridge: float = 0.1
    query_steps: int = 6

    def __post_init__(self) -> None:
        choice(self.fits, "refit", REFITS)
        number(self.ridge, "ridge", minimum=0)
        integer(self.query_steps, "query_steps", minimum=0)


def refit_word(refit: str | bool | None, *, default: str, batches: bool, given: str = "none") -> str:
    """The word of `REFITS` that is meant.

    Args:
        refit: a word, `True` or `False`, or `None` for the default.
        default: what `None` means where there are batches; "none" without.
        batches: whether there are calibration batches, which a refit runs.
        given: what there is instead, for the message.

    Raises:
        ValueError: for another word, or a refit without batches.
    """
    if refit is None:
        return default if batches else "none"
    word = {True: "full", False: "none"}[refit] if isinstance(refit, bool) else choice(refit, "refit", REFITS)
    if word != "none" and not batches:
        raise ValueError(
            f"refit={refit!r} needs calibration batches, and calibration is {given}; give batches of model inputs, or "
            "leave refit out"
        )
    return word


def listed(calibration: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The batches of a refit, which every layer runs; raises `ValueError` if there are none."""
    batches = list(calibration)
    if not batches:
        raise ValueError("refit needs calibration batches, and got none (an iterator is spent after one use)")
    return batches
