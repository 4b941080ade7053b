"""Checks of arguments: what they accept, what they return, and what the error says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_attnkit.common.checks import choice, fraction, in_range, integer, number

BOOLEANS = (True, np.True_, torch.tensor(True))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_other_libraries_become_ints(value: Any) -> None:
    for found in (integer(value, "n", minimum=3, maximum=3), in_range(value, 4, "layer")):
        assert type(found) is int and found == 3


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_other_libraries_become_floats(value: Any) -> None:
    for found in (number(value, "x", above=0, maximum=0.5), fraction(value, "x")):
        assert type(found) is float and found == 0.5


@pytest.mark.parametrize("value", [*BOOLEANS, 2.0, "2", None, torch.tensor([2]), torch.tensor(2.0), [2]])
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"n={value!r} must be an integer")):
        integer(value, "n")
    with pytest.raises(ValueError, match=re.escape(f"layer {value!r} is no integer; there are layers 0 to 3")):
        in_range(value, 4, "layer")


@pytest.mark.parametrize("value", [*BOOLEANS, "0.5", None, float("nan"), float("inf"), torch.tensor([0.5]), 1j])
def test_what_is_no_finite_number(value: Any) -> None:
    for check in (number, fraction):
        with pytest.raises(ValueError, match=re.escape(f"x={value!r} must be a number")):
            check(value, "x")


BOUNDS: list[tuple[Callable[[], Any], str]] = [
    (lambda: integer(0, "n", minimum=1), "n=0 must be an integer of at least 1"),
    (lambda: integer(3, "n", maximum=2), "n=3 must be an integer of at most 2"),
    (lambda: integer(3, "n", minimum=1, maximum=2, why="a place"), "n=3 must be an integer from 1 to 2: a place"),
    (lambda: number(0, "x", above=0), "x=0 must be a number above 0"),
    (lambda: number(1, "x", above=0, below=1), "x=1 must be a number above 0 and below 1"),
    (lambda: number(-1, "x", minimum=0, why="a price"), "x=-1 must be a number of at least 0: a price"),
    (lambda: number(2, "x", maximum=1.5), "x=2 must be a number of at most 1.5"),
    (lambda: fraction(1.01, "x"), "x=1.01 must be a number from 0 to 1"),
    (lambda: choice("c", "m", ["a", "b"]), "m='c' must be one of 'a', 'b'"),
    (lambda: choice(["a"], "m", ["a", "b"], why="a word"), "m=['a'] must be one of 'a', 'b': a word"),
    (lambda: in_range(4, 4, "head", "layer 1: "), "layer 1: head 4 is out of range; there are heads 0 to 3"),
    (lambda: in_range(-1, 4, "head"), "head -1 is out of range; there are heads 0 to 3"),
]


@pytest.mark.parametrize(("call", "message"), BOUNDS, ids=[message for _, message in BOUNDS])
def test_message(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message


def test_bounds_are_included_or_not() -> None:
    assert integer(1, "n", minimum=1, maximum=1) == fraction(1, "x") == number(1, "x", minimum=1, maximum=1) == 1
    assert fraction(0, "x") == 0 and choice("a", "m", ["a"]) == "a"
