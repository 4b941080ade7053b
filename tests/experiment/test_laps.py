"""Seconds and peak memory of one lap after another."""

from __future__ import annotations

import torch

from hf_attnkit.experiment.costs import Laps


def test_the_peak_of_memory_starts_again_with_each_lap() -> None:
    laps, size = Laps(torch.device("cpu")), 256 << 20
    torch.ones(size // 4).sum()
    _, large = laps.lap()
    _, small = laps.lap()
    if "most so far" in large["peak_memory_of"]:
        assert small["peak_memory_bytes"] >= large["peak_memory_bytes"]  # macOS: it cannot be reset
    else:
        assert large["peak_memory_bytes"] - small["peak_memory_bytes"] > 0.9 * size
