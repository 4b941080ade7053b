"""Heat maps of head importance: layers down, heads across, removed heads crossed out; a PNG, or SVG for a page.

Colours go by rank, so that one outlier does not decide them; the bar says which score each quarter ends at.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from hf_attnkit.experiment.report.picture import save_png

Scores = NDArray[np.float64]
Removed = Mapping[int, Iterable[int]]

CELL, MARGINS = 0.34, (0.9, 1.5)  # inches
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
SVG = "http://www.w3.org/2000/svg"
CELLS = "cells"  # id of the group of cells in the SVG


def draw_importance(maps: Mapping[str, tuple[Tensor, Removed]], path: Path, title: str | None = None) -> None:
    """Draw one heat map per entry, next to each other, and write a PNG in one step.

    Args:
        maps: name -> (scores `(num_layers, num_heads)`, higher = keep, NaN where a layer has no such head; removed
            heads per layer).
        title: over all of them.
    """
    found = {name: (scores.double().numpy(), removed) for name, (scores, removed) in maps.items()}
    width = sum(_size(scores)[0] for scores, _ in found.values())
    height = max(_size(scores)[1] for scores, _ in found.values()) + 0.6
    figure = Figure(figsize=(max(width, 4.0), height), layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=11, wrap=True)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (name, (scores, removed)) in zip(axes, found.items(), strict=True):
        _draw(axis, scores, removed)
        axis.set_title(name)
    save_png(figure, path)


def importance_svg(scores: Scores, removed: Removed, title: str) -> Markup:
    """One heat map as an element of a page. A cell says its number in a hover title, and text has no colour of its own.

    Args:
        scores: `(num_layers, num_heads)`, higher = keep, NaN where a layer has no such head.
        removed: heads per layer.
        title: for those who cannot see it.
    """
    figure = Figure(figsize=_size(scores), layout="constrained")
    _draw(figure.subplots(), scores, removed)
    written = io.StringIO()
    # Text stays text, and the same scores give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_attnkit"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(written.getvalue())
    root.attrib |= {"role": "img", "aria-label": title}
    # Its rules would be those of the whole page.
    for definitions in root.findall(f"{{{SVG}}}defs"):
        for style in definitions.findall(f"{{{SVG}}}style"):
            definitions.remove(style)
    for text in root.iter(f"{{{SVG}}}text"):
        rules = dict(rule.split(":", 1) for rule in text.attrib.pop("style", "").split(";") if ":" in rule)
        anchor = rules.get(" text-anchor", rules.get("text-anchor", "start"))
        text.set("text-anchor", anchor.strip())
    for group in root.iter(f"{{{SVG}}}g"):
        if group.attrib.pop("id", None) == CELLS:
            for cell, number in zip(group, np.ndindex(*scores.shape), strict=True):
                _name(cell, number, float(scores[number]), removed)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _name(cell: ElementTree.Element, place: tuple[int, ...], score: float, removed: Removed) -> None:
    layer, head = place
    if np.isfinite(score):
        gone = ", removed" if head in removed.get(layer, ()) else ""
        ElementTree.SubElement(cell, f"{{{SVG}}}title").text = f"layer {layer}, head {head}: {score:.6g}{gone}"


def _size(scores: Scores) -> tuple[float, float]:
    rows, columns = scores.shape
    return max(CELL * columns + MARGINS[0], 3.2), CELL * rows + MARGINS[1]


def _draw(axis: Axes, scores: Scores, removed: Removed) -> None:
    rows, columns = scores.shape
    cells = axis.pcolormesh(np.ma.masked_invalid(ranks(scores)), vmin=0, vmax=1, cmap="viridis", edgecolors="none")
    cells.set_gid(CELLS)
    axis.set_aspect("equal")
    axis.invert_yaxis()
    axis.set_frame_on(False)
    for across, number in ((True, columns), (False, rows)):
        shown = range(0, number, max(1, -(-number // 16)))
        set_ticks = axis.set_xticks if across else axis.set_yticks
        set_ticks([place + 0.5 for place in shown], labels=[str(place) for place in shown])
    axis.tick_params(length=0)
    axis.set(xlabel="head", ylabel="layer")
    places = [(head + 0.5, layer + 0.5) for layer, heads in removed.items() for head in heads]
    if places:
        x, y = zip(*places, strict=True)
        # White on dark: seen on every colour, and on paper.
        axis.scatter(x, y, marker="x", color="#111111", s=60, linewidths=4)
        axis.scatter(x, y, marker="x", color="#ffffff", s=60, linewidths=1.8)
    _legend(axis, cells, scores)


def _legend(axis: Axes, cells: QuadMesh, scores: Scores) -> None:
    assert axis.figure is not None
    known = scores[np.isfinite(scores)]
    bar = axis.figure.colorbar(cells, ax=axis, location="bottom", aspect=30, drawedges=False)
    bar.outline.set_visible(False)
    names = [f"{score:.3g}" for score in np.quantile(known, QUARTERS)] if known.size else [""] * len(QUARTERS)
    bar.set_ticks(list(QUARTERS), labels=names)
    bar.ax.tick_params(length=0)
    bar.set_label("score (colour by rank), higher = keep; \N{MULTIPLICATION SIGN} removed")


def ranks(scores: Scores) -> Scores:
    """Each score's place among all, 0 lowest to 1 highest; equal ones share the middle, all equal have 0.5."""
    known = np.isfinite(scores)
    ordered = np.sort(scores[known])
    found = np.full(scores.shape, np.nan)
    if ordered.size > 1:
        first, last = (np.searchsorted(ordered, scores[known], side) for side in ("left", "right"))
        found[known] = (first + last - 1) / 2 / (ordered.size - 1)
    else:
        found[known] = 0.5
    return found
