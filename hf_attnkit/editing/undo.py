"""Attributes set, and set back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class Undo:
    """Sets attributes, parameters and modules, and remembers what was there."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, which the owner may not have had.

        Parameters, buffers and modules keep their place in the order of the owner's.
        """
        tables: list[dict[str, Any]] = []
        if isinstance(owner, nn.Module):
            tables = [owner._parameters, owner._buffers, owner._modules]
        table = next((each for each in tables if name in each), None)
        if table is not None:
            self._steps.append(functools.partial(table.__setitem__, name, table[name]))
            table[name] = value
        elif hasattr(owner, name):
            self._steps.append(functools.partial(setattr, owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        else:
            self._steps.append(functools.partial(delattr, owner, name))
            setattr(owner, name, value)

    def drop(self, owner: Any, name: str) -> None:
        """Take an attribute of the object itself away."""
        self._steps.append(functools.partial(setattr, owner, name, owner.__dict__[name]))
        delattr(owner, name)

    def __len__(self) -> int:
        return len(self._steps)

    def back_to(self, length: int = 0) -> None:
        """Undo what was set since there were so many steps, last first."""
        while len(self._steps) > length:
            self._steps.pop()()
