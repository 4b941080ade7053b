"""Checks of arguments, one for each sort of value: they return it as the plain Python type, or say what is wrong."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def integer(value: Any, name: str, *, minimum: int | None = None, maximum: int | None = None, why: str = "") -> int:
    """`value` as an int; integers of NumPy and torch count, booleans do not.

    Args:
        name: the argument's, for the message.
        minimum, maximum: bounds, both included.
        why: what the number is, or what to do instead; put after the message.

    Raises:
        ValueError: naming the value and the constraint.
    """
    found = _as_int(value)
    if found is None or not (minimum is None or found >= minimum) or not (maximum is None or found <= maximum):
        if minimum is not None and maximum is not None:
            bounds = f" from {minimum} to {maximum}"
        else:
            bounds = "" if minimum is None else f" of at least {minimum}"
            bounds += "" if maximum is None else f" of at most {maximum}"
        raise ValueError(_message(value, name, f"an integer{bounds}", why))
    return found


def number(
    value: Any,
    name: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    why: str = "",
) -> float:
    """`value` as a finite float; numbers of NumPy and torch count, booleans do not.

    Args:
        name, why: as `integer`.
        minimum, maximum: bounds, both included.
        above, below: bounds, both excluded.

    Raises:
        ValueError: naming the value and the constraint.
    """
    found = _as_float(value)
    bounds = [
        (minimum, "of at least {}", operator.ge),
        (above, "above {}", operator.gt),
        (maximum, "of at most {}", operator.le),
        (below, "below {}", operator.lt),
    ]
    given = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
    if found is None or not math.isfinite(found) or not all(holds(found, bound) for bound, _, holds in given):
        limits = " and ".join(words.format(bound) for bound, words, _ in given) or "that is finite"
        raise ValueError(_message(value, name, f"a number {limits}", why))
    return found


def fraction(value: Any, name: str, *, why: str = "") -> float:
    """`value` as a float from 0 to 1, both included.

    Raises:
        ValueError: naming the value and the constraint.
    """
    found = _as_float(value)
    if found is None or not 0 <= found <= 1:
        raise ValueError(_message(value, name, "a number from 0 to 1", why))
    return found


def choice(value: Any, name: str, options: Iterable[str], *, why: str = "") -> str:
    """`value`, if it is one of the names.

    Raises:
        ValueError: naming the value and all options.
    """
    options = list(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(_message(value, name, f"one of {', '.join(map(repr, options))}", why))
    return value


def in_range(value: Any, count: int, what: str, where: str = "") -> int:
    """`value` as an int from 0 to `count` - 1: the place of something that is counted, such as a layer.

    Args:
        what: "layer", "head".
        where: put before the message.

    Raises:
        ValueError: naming the value and the places that there are.
    """
    found = _as_int(value)
    if found is None or not 0 <= found < count:
        problem = "is no integer" if found is None else "is out of range"
        raise ValueError(f"{where}{what} {value!r} {problem}; there are {what}s 0 to {count - 1}")
    return found


def _message(value: Any, name: str, constraint: str, why: str) -> str:
    return f"{name}={value!r} must be {constraint}" + (f": {why}" if why else "")


def _as_int(value: Any) -> int | None:
    # A bool of torch has an index too, and so has NumPy's before 2.3.
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, Tensor) and (value.dtype is torch.bool or value.dim()):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _as_float(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.dim() == 0 and value.dtype is not torch.bool and not value.is_complex() else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
