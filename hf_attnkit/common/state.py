"""A module's or config's state: changed within a context, or restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
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
        if any(was_training.values()):
            model.eval()
        yield
    finally:
        for module, training in was_training.items():
            if module.training != training:  # setting it costs as much as a small model's forward pass
                module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def plain_mode() -> Iterator[None]:
    """What runs inside gives the same whatever mode its caller is in; serves as a decorator too.

    No inference mode, whose tensors could not be trained afterwards; no autocast; float32 as the default dtype.
    """
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
