"""Attributes set, and set back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Undo:
    """Sets attributes, parameters and modules, and remembers what was there."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`; parameters, buffers and modules keep their place in the order of the owner's."""
        if isinstance(owner, nn.Module):
            for table in (owner._parameters, owner._buffers, owner._modules):
                if name in table:
                    before = table[name]  # type: ignore[index]
                    table[name] = value  # type: ignore[index]
                    self._steps.append(lambda: table.__setitem__(name, before))  # type: ignore[union-attr]
                    return
        old = vars(owner).get(name)
        setattr(owner, name, value)
        self._steps.append(lambda: setattr(owner, name, old))

    def __len__(self) -> int:
        return len(self._steps)

    def back_to(self, length: int = 0) -> None:
        """Undo what was set since there were so many steps, last first."""
        while len(self._steps) > length:
            self._steps.pop()()
