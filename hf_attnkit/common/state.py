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

    No inference mode, whose tensors could not be trained afterwards; no autocast; float32 as the default dtype; matrix
    products as precise as their dtype.
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
        stack.enter_context(full_precision())
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products are as precise as their dtype says, whatever the process allows for speed.

    No TF32 (eps 1e-3) or bfloat16 inside of float32, and no sums in 16 bits: bounds that follow from the dtype hold.
    Convolutions are left alone.
    """
    own, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    legacy = _legacy()
    before = legacy, own.fp32_precision, cpu.fp32_precision
    sums = own.allow_fp16_reduced_precision_reduction, own.allow_bf16_reduced_precision_reduction
    in_16_bits = own.allow_fp16_accumulation
    reduced = legacy not in ("highest", None) or not {*before[1:]} <= {"ieee", "none"}
    with ExitStack() as stack:
        if reduced:
            stack.callback(_allow, *before)
            _allow(legacy and "highest", "ieee", "ieee")
        if any(sums) or in_16_bits:
            stack.callback(_allow_sums, *sums, in_16_bits)
            _allow_sums(False, False, False)
        yield


def _legacy() -> str | None:
    """PyTorch's older setting for all devices, or `None` where a newer one contradicts it, which it refuses to read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _allow(legacy: str | None, cuda: str, cpu: str) -> None:
    if legacy is not None:
        torch.set_float32_matmul_precision(legacy)  # sets the other two as well
    torch.backends.cuda.matmul.fp32_precision = cuda
    torch.backends.mkldnn.matmul.fp32_precision = cpu  # type: ignore[attr-defined]


def _allow_sums(float16: bool, bfloat16: bool, accumulated: bool) -> None:
    own = torch.backends.cuda.matmul
    own.allow_fp16_reduced_precision_reduction = float16
    own.allow_bf16_reduced_precision_reduction = bfloat16
    own.allow_fp16_accumulation = accumulated
