"""What a stage costs beside its metrics: time per batch and memory; and the machine that both belong to."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Sized
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainingArguments

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

TIMED_BATCHES = 8


def time_per_batch(trainer: Trainer, data: Dataset) -> dict[str, Any]:
    """Forward time of a model that `trainer` has just evaluated, on the first batches of `data`.

    Each process times its own share; with several processes these are the main one's.

    Returns:
        `seconds_per_batch`, the median over `timed_batches["number"]` batches after one that is not counted, and the
        largest batch's `shape` (sequences, tokens).
    """
    args = trainer.args
    rows = min(TIMED_BATCHES * args.eval_batch_size * args.world_size, len(cast(Sized, data)))
    # Run to its end: accelerate remembers a loader that is left early, and training would take its state for its own.
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader(Subset(data, range(rows)))]
    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    model = trainer.model_wrapped.eval()
    seconds = []
    for batch in (longest, *batches):
        _finish(args.device)
        start = time.perf_counter()
        trainer.prediction_step(model, dict(batch), prediction_loss_only=True)
        _finish(args.device)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds_per_batch": statistics.median(seconds[1:]),
        "timed_batches": {"number": len(batches), "shape": list(longest["input_ids"].shape)},
    }


def reset_peak_memory(device: torch.device) -> None:
    """Begin anew where the device can: what `peak_memory` gives next is from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, Any]:
    """`peak_memory_bytes`, and `peak_memory_of`: what that number is of. Nothing where it cannot be had."""
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_memory_of": "tensors on the GPU, during the evaluation",
        }
    if resource is None:
        return {}
    # Bytes on macOS, KiB elsewhere; it never falls, so later stages show the most of all so far.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_memory_of": "resident memory of the process, up to the end of the stage",
    }


def machine(training: TrainingArguments) -> str:
    """Where the run was: device, threads of a CPU, and processes if several."""
    if training.device.type == "cuda":
        name = torch.cuda.get_device_name(training.device)
    else:
        threads = torch.get_num_threads()
        name = f"{training.device.type.upper()} {platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    return name if training.world_size == 1 else f"{name}, {training.world_size} processes"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
