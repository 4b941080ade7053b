"""What a stage costs: seconds and peak memory; and the machine that both belong to."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import TrainingArguments

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows has no such module
    resource = None


class Laps:
    """A stopwatch of seconds and peak memory: each lap ends where the next starts. It runs from when it is made.

    On a GPU the memory is that of tensors, on a CPU the process's resident memory. Linux can reset the peak; elsewhere
    it never falls, and a lap shows the highest of all laps so far. `peak_memory_of` says which it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._start = device, time.perf_counter()
        self.lap()

    def lap(self) -> tuple[float, dict[str, Any]]:
        """Seconds since the last lap, and `peak_memory_bytes` since then with `peak_memory_of`, empty where the system
        does not tell it."""
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
    """Reset the peak of resident memory, which Linux can do (man 5 proc, clear_refs).

    Before that glibc gives freed memory back, which would count for the next lap: 500 MiB after a training.
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
