"""Time and peak memory of functions that compete, measured alternately within one process.

Clocks, caches and neighbours drift over minutes, so one side after the other compares the hours, not
the functions. Here every repetition runs each function once, beginning with another one each time,
and what is reported is the median, its quartiles, and ratios of medians.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

# A timed sample lasts at least this long, in seconds: a single short call would measure the clock.
SAMPLE = 0.02
MOST_CALLS = 200


def time_alternately(
    calls: Mapping[str, Call], repeats: int, device: torch.device, step: Callable[[str], object] = lambda label: None
) -> dict[str, list[float]]:
    """Seconds per call, `repeats` numbers for each label; the numbers at one index belong to one round.

    A round before the first is not counted: it compiles, fills the allocator, and shows how many
    calls make a sample.

    Args:
        step: called with the label before each sample, for a progress bar: `repeats + 1` times a label.
    """
    calls_per_sample = {}
    for label, call in calls.items():
        step(label)
        call()
        once = _seconds(call, 1, device)
        calls_per_sample[label] = min(MOST_CALLS, math.ceil(SAMPLE / max(once, SAMPLE / MOST_CALLS)))
    found: dict[str, list[float]] = {label: [] for label in calls}
    labels = list(calls)
    for repeat in range(repeats):
        first = repeat % len(labels)
        for label in labels[first:] + labels[:first]:
            step(label)
            found[label].append(_seconds(calls[label], calls_per_sample[label], device))
    return found


def _seconds(call: Call, number: int, device: torch.device) -> float:
    finish(device)
    start = time.perf_counter()
    for _ in range(number):
        call()
    finish(device)
    return (time.perf_counter() - start) / number


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return float(lower), float(median), float(upper)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes that tensors made during `call` hold at one time: results count, inputs do not.

    On CUDA the allocator keeps this number. On the CPU it is summed from the allocations and frees
    that PyTorch's profiler records, which is exact and the same in every run, where the resident set
    of the process is neither; scratch that a library takes without PyTorch's allocator is not seen.
    """
    if device.type == "cuda":
        finish(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(max(held, default=0))
