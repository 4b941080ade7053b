"""Refits as a command line says them: a word, and `RefitOptions` after a colon: `output:ridge=0.1,held_out=0`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from hf_attnkit.experiment.pruning import parse_options
from hf_attnkit.refitting.options import REFITS, RefitOptions


def parse_refit(text: str, flag: str, words: Iterable[str] = tuple(REFITS)) -> RefitOptions:
    """The refit that is meant.

    Args:
        flag: what it was given to, for the message.
        words: the refits that there are.

    Raises:
        ValueError: for another word, or options that it does not have.
    """
    word, colon, options = text.partition(":")
    if word not in (known := tuple(words)) or bool(colon) != bool(options):
        raise ValueError(
            f"{flag} {text!r} must be one of {', '.join(known)}; options may follow, as in output:ridge=0.1,held_out=0"
        )
    given = parse_options(options.split(",") if options else [], f"{flag} {text!r}: the option")
    names = [field.name for field in fields(RefitOptions)][1:]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{flag} {text!r}: option {unknown[0]!r} must be one of {', '.join(names)}")
    try:
        return RefitOptions(word, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{flag} {text!r}: {error}") from error
