"""Attributes set, and set back: for good, or for a while.

Of a parameter that was cut, what stayed is in the new one. So of the old one only the rows that went are kept, where
nothing else holds it (an optimizer, another model that shares it, the user): a change of a large model then never has
two copies of its attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


class _Thinned:
    """A parameter of which only the rows that another one does not have are kept."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter, dim: int, kept: Tensor) -> None:
        """
        Args:
            kept: numbers of the rows along `dim` that `new` consists of.
        """
        self._old, self._new, self._dim = old, new, dim
        self._kept = kept.to(old.device)
        gone = torch.ones(old.shape[dim], dtype=torch.bool, device=old.device)
        gone[self._kept] = False
        self._gone = gone.nonzero()[:, 0]
        self.thin()

    def thin(self) -> None:
        """Keep what the other one does not have."""
        self._old.data = self._old.detach().index_select(self._dim, self._gone)

    def fill(self) -> None:
        """Make it whole again."""
        rest, new = self._old.detach(), self._new.detach()
        shape = list(rest.shape)
        shape[self._dim] = len(self._gone) + len(self._kept)
        whole = rest.new_empty(shape)
        whole.index_copy_(self._dim, self._gone, rest).index_copy_(self._dim, self._kept, new.to(rest.device))
        self._old.data = whole


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

    def __init__(self, *, thins: bool = False) -> None:
        """
        Args:
            thins: whether `thin` does anything; it costs a copy each time that something is undone.
        """
        self._steps: list[_Place] = []
        self._thins = thins
        self._thinned: dict[int, _Thinned] = {}  # by the step

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

    def thin(self, dim: int, kept: Tensor) -> None:
        """Of the parameter that was replaced last, keep no more than what the new one does not have.

        Args:
            kept: numbers of the rows along `dim` that the new one consists of.
        """
        step = self._steps[-1]
        new, old = step.get(), step.old
        # Held by the step, by `old` here and by the call: by nothing else.
        if not self._thins or not isinstance(old, nn.Parameter) or old.grad is not None or sys.getrefcount(old) > 3:
            return
        with torch.inference_mode(False):
            self._thinned[len(self._steps) - 1] = _Thinned(old, new, dim, kept)

    def covers(self, module: nn.Module) -> bool:
        """Whether undoing brings back this module's weight."""
        return any(step.owner is module and step.name == "weight" for step in self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def back_to(self, length: int = 0) -> None:
        """Undo what was set since there were so many steps, last first."""
        while len(self._steps) > length:
            step = self._steps.pop()
            if (thinned := self._thinned.pop(len(self._steps), None)) is not None:
                thinned.fill()
            step.put(step.old)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Everything as it was while the block runs; then as it is now, also what others put there since."""
        present = []
        for number, step in reversed(list(enumerate(self._steps))):
            present.append((step, step.get()))
            if number in self._thinned:
                self._thinned[number].fill()
            step.put(step.old)
        try:
            yield
        finally:
            for number, (step, value) in enumerate(reversed(present)):
                step.put(value)
                if number in self._thinned:
                    self._thinned[number].thin()
