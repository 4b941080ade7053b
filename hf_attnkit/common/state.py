"""A module's or config's state: changed within a context, or restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def replace_state(owner: Any, state: dict[str, Any]) -> None:
    """Give the same object (a config, a module) other attributes; others hold it by reference."""
    state = dict(state)
    owner.__dict__.clear()
    owner.__dict__.update(state)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the context, every module is in evaluation mode; then each in the mode that it had."""
    was_training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
