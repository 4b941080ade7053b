"""A picture of cost over length: time above, peak memory below, one column for each part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from hf_attnkit.experiment.benchmarking.candidates import BASELINES, PARTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

QUANTITIES = (("median_seconds", 1e3, "time, ms"), ("peak_bytes", 2**-20, "peak memory, MiB"))


def draw_costs(measurements: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a PNG. Baselines are dashed; both axes are logarithmic; the legend holds for all panels."""
    parts = [part for part in PARTS if any(found["part"] == part for found in measurements)]
    labels = list(dict.fromkeys(found["candidate"] for found in measurements))
    styles = _styles(labels)
    figure, axes = plt.subplots(
        *(2, len(parts)), figsize=(4.4 * len(parts) + 1.8, 7.4), squeeze=False, sharex=True, layout="constrained"
    )
    lines = {}
    for row, (key, factor, name) in zip(axes, QUANTITIES, strict=True):
        for axis, part in zip(row, parts, strict=True):
            for label in labels:
                own = [found for found in measurements if (found["part"], found["candidate"]) == (part, label)]
                if own:
                    lengths, costs = [found["length"] for found in own], [found[key] * factor for found in own]
                    (lines[label],) = axis.plot(lengths, costs, markersize=4, linewidth=1.6, **styles[label])
            lengths = sorted({found["length"] for found in measurements})
            axis.set(xscale="log", yscale="log")
            axis.xaxis.set(major_locator=FixedLocator(lengths), minor_locator=NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(color="0.9")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(name)
    for part, top, bottom in zip(parts, axes[0], axes[1], strict=True):
        top.set_title(PARTS[part])
        bottom.set_xlabel("tokens in the cache" if part == "decode" else "tokens")
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    os.replace(partial, path)


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker for each label; as many colours as the colour-blind safe list of Wong has."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B0A000")
    greys, dashes, markers = ("0.2", "0.6"), ("--", ":", "-."), "osD^vP*X"
    styles: dict[str, dict[str, Any]] = {}
    for place, label in enumerate(label for label in labels if label in BASELINES):
        styles[label] = {"color": greys[place % 2], "linestyle": dashes[place % 3], "marker": markers[place % 8]}
    for place, label in enumerate(label for label in labels if label not in BASELINES):
        styles[label] = {"color": colours[place % 8], "linestyle": "-", "marker": markers[place % 8]}
    return styles
