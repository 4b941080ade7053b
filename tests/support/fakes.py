"""Fakes with the signature of what they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import create_autospec


def never(function: Callable[..., Any], why: str) -> Any:
    """In place of `function`: fails the test that calls it."""
    return create_autospec(function, side_effect=AssertionError(why))
