"""Attributes set, and set back: for good, or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_ABSENT = object()


@dataclass(frozen=True)
class _Place:
    """Where a value is: an attribute, or an entry of a module's table of parameters, buffers or modules.

    Attributes:
        old: what was there; `_ABSENT` for nothing.
    """

    owner: Any
    name: str
    table: dict[str, Any] | None
    old: Any

    def get(self) -> Any:
        if self.table is not None:
            return self.table.get(self.name, _ABSENT)
        return getattr(self.owner, self.name, _ABSENT)

    def put(self, value: Any) -> None:
        if self.table is not None and value is _ABSENT:
            del self.table[self.name]
        elif self.table is not None:
            self.table[self.name] = value
        elif value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


class Undo:
    """Sets attributes, parameters and modules, and remembers what was there."""

    def __init__(self) -> None:
        self._steps: list[_Place] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, which the owner may not have had.

        Parameters, buffers and modules keep their place in the order of the owner's.
        """
        tables: list[dict[str, Any]] = []
        if isinstance(owner, nn.Module):
            tables = [owner._parameters, owner._buffers, owner._modules]
        table = next((each for each in tables if name in each), None)
        old = table[name] if table is not None else getattr(owner, name, _ABSENT)
        self._steps.append(_Place(owner, name, table, old))
        self._steps[-1].put(value)

    def drop(self, owner: Any, name: str) -> None:
        """Take an attribute of the object itself away."""
        # Not by `setattr` when it comes back: a module that is an attribute only would become a part.
        self._steps.append(_Place(owner, name, owner.__dict__, owner.__dict__[name]))
        self._steps[-1].put(_ABSENT)

    def keep(self, module: nn.Module) -> None:
        """Remember the parameters of a module, which others are to replace: undoing brings them back."""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self.set(module, name, parameter)

    def covers(self, module: nn.Module) -> bool:
        """Whether undoing brings back this module's weight."""
        return any(step.owner is module and step.name == "weight" for step in self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def back_to(self, length: int = 0) -> None:
        """Undo what was set since there were so many steps, last first."""
        while len(self._steps) > length:
            step = self._steps.pop()
            step.put(step.old)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Everything as it was while the block runs; then as it is now, also what others put there since."""
        present = []
        for step in reversed(self._steps):
            present.append((step, step.get()))
            step.put(step.old)
        try:
            yield
        finally:
            for step, value in reversed(present):
                step.put(value)
