"""A picture of texts that were read through a cache: perplexity, bytes of the cache and memory over the tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B0A000")
BINS = 50  # of the text: chunks alone vary too much to be seen as a line


def draw(stages: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a PNG: one line for each stage, which has its `points` as dictionaries."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    length = max(point["tokens"] for stage in stages for point in stage["points"])
    for stage, colour in zip(stages, COLOURS * len(stages), strict=False):
        points, style = stage["points"], {"label": stage["variant"], "color": colour, "linewidth": 1.4}
        axes[0].plot(*_smooth(points, length), **style)
        for axis, name in zip(axes[1:], ("cache_bytes", "memory_bytes"), strict=True):
            told = [point for point in points if point[name]]
            axis.plot([point["tokens"] for point in told], [point[name] / 2**20 for point in told], **style)
    for axis, name in zip(axes, ("perplexity", "cache, MiB", "memory of the process, MiB"), strict=True):
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_xlabel("tokens read")
    axes[2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[0].legend(frameon=False)
    axes[0].set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    os.replace(partial, path)


def _smooth(points: Sequence[Mapping[str, Any]], length: int) -> tuple[list[int], list[float]]:
    """Tokens and the perplexity of all chunks that end in the same fiftieth of the text."""
    sums: dict[int, list[float]] = {}
    for point in points:
        number = math.ceil(point["tokens"] * BINS / length)
        own = sums.setdefault(number, [0, 0.0, 0])
        own[0], own[1], own[2] = point["tokens"], own[1] + point["loss"], own[2] + point["predicted"]
    found = [(int(tokens), math.exp(loss / count)) for tokens, loss, count in sums.values() if count]
    return [tokens for tokens, _ in found], [value for _, value in found]
