"""Checks of arguments, one for each kind of value."""

from __future__ import annotations

import operator
from typing import Any


def in_range(value: Any, count: int, what: str, where: str = "") -> int:
    """`value` as an int from 0 to `count` - 1; integers of NumPy and torch count.

    Raises:
        ValueError: naming what it is ("layer", "head") and, before that, where.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not 0 <= number < count:
        problem = "is no integer" if number is None else "is out of range"
        raise ValueError(f"{where}{what} {value!r} {problem}; there are {what}s 0 to {count - 1}")
    return number
