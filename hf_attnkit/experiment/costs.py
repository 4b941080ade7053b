"""What a stage costs beside its metrics: time per batch and memory; and the machine that both belong to."""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainingArguments

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

TIMED_BATCHES = 8


def time_per_batch(trainer: Trainer, data: Dataset[Any]) -> dict[str, Any]:
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


class Laps:
    """Seconds and peak memory of one thing after another, on the clock from its making on.

    On a GPU the memory is that of tensors, on a CPU the process's resident memory. Linux can begin a peak anew; where
    that is not so it never falls, and later laps show the most of all so far. `peak_memory_of` says which it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._start = device, time.perf_counter()
        self.lap()

    def lap(self) -> tuple[float, dict[str, Any]]:
        """Seconds since the last lap; `peak_memory_bytes` since then and `peak_memory_of`, or nothing of these where
        they cannot be had."""
        _finish(self.device)
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return seconds, {"peak_memory_bytes": peak, "peak_memory_of": "tensors on the GPU"}
        if resource is None:
            return seconds, {}
        # Bytes on macOS, KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        of = "resident memory of the process" if _forget_peak() else "resident memory of the process, the most so far"
        return seconds, {"peak_memory_bytes": peak, "peak_memory_of": of}


def _forget_peak() -> bool:
    """Have Linux count the peak of resident memory from here on (man 5 proc, clear_refs).

    glibc keeps most of what was freed, which would be counted for what comes next: after a training 500 MiB.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


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
