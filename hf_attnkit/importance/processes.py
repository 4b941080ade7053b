"""Sums over queries, tokens or examples, added over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_attnkit.models.layers import AttentionLayer


def over_processes(layers: Sequence[AttentionLayer], sums: Sequence[Tensor], what: str) -> list[Tensor]:
    """The layers' sums, added over all processes where `torch.distributed` runs several, and checked.

    Every process calls it, with the sums over its own share of the batches, and gets the same.

    Args:
        sums: one tensor per layer, of any shape.
        what: that was summed, for the message.

    Returns:
        The same in float64, on the CPU.

    Raises:
        ValueError: if a sum is not finite; then in every process.
    """
    added = [tensor.detach().to("cpu", torch.float64) for tensor in sums]
    if num_processes() > 1:
        flat = torch.cat([tensor.flatten() for tensor in added]).to(_device())
        dist.all_reduce(flat)
        parts = flat.cpu().split([tensor.numel() for tensor in added])
        added = [part.view(tensor.shape) for part, tensor in zip(parts, added, strict=True)]
    all_finite(layers, added, what)
    return added


def from_processes(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order, on the CPU; every process calls it and gets the same.

    Args:
        rows: `(number, ...)`, on the CPU; numbers may differ, also be 0.
    """
    if num_processes() == 1:
        return rows
    found: list[Any] = [None] * num_processes()
    dist.all_gather_object(found, rows)
    return torch.cat(found)


def all_finite(layers: Sequence[AttentionLayer], tensors: Sequence[Tensor], what: str) -> None:
    """Raise `ValueError` if a layer's tensor is not finite."""
    for layer, tensor in zip(layers, tensors, strict=True):
        if not tensor.isfinite().all():
            raise ValueError(
                f"layer {layer.index}: {what} contain NaN or infinity; run the model in bfloat16 or float32 and look "
                "for a batch that breaks it"
            )


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _device() -> torch.device:
    """Where the processes can add tensors: NCCL has no CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
