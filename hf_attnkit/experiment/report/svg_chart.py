"""Charts as SVG that a page holds inline: lines over training steps, and a heat map of heads.

Text is text, and nothing has a colour of its own but what means something: the page's style sheet (page.css)
colours the rest, so that a chart is right in light, in dark and on paper. Numbers stand in hover titles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 12, 44
CELL = 26
DOTS = 100  # hover points of one line, at most
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
COLOURS = 4  # of the style sheet: --line-0 and on


@dataclass(frozen=True)
class Line:
    """Points `(step, value)` in order; `ramp` places it in a sequence of lines, 0 to 1, else it has a colour of its
    own."""

    name: str
    points: Sequence[tuple[float, float]]
    ramp: float | None = None


def line_chart(title: str, unit: str, lines: Sequence[Line], legend: Collection[int] | None = None) -> str:
    """A figure with title, legend and axes, the horizontal one in optimizer steps.

    Args:
        unit: label of the vertical axis.
        legend: numbers of the lines that stand in the legend; all by default.
    """
    finite = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.ramp) for line in lines]
    finite = [line for line in finite if line.points]
    if not finite:
        return _figure(title, "", '<p class="note">No finite number was logged.</p>')
    xs, ys = ([point[axis] for line in finite for point in line.points] for axis in (0, 1))
    # Whole steps from the run's start to its last, on values between round numbers.
    last = max(*xs, 1)
    x_ticks, y_ticks = [tick for tick in _ticks(0, last, integer=True) if tick <= last], _ticks(min(ys), max(ys))
    x = _scale(0, last, LEFT, WIDTH - RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<path class="tick" d="M{x(tick):.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(13 {height}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>')
    entries = []
    for number, line in enumerate(finite):
        style, dash = _stroke(line, number)
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line.points)
        parts.append(f'<g class="line" style="{style}"><path d="{path}" stroke-dasharray="{dash}"/>')
        for a, b in line.points[:: math.ceil(len(line.points) / DOTS)]:
            parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{3 if len(line.points) <= 30 else 2}"><title>'
                         f"{escape(line.name)}, step {_number(a)}: {b:.6g}</title></circle>")  # fmt: skip
        parts.append("</g>")
        swatch = f'<path d="M0 5H22" stroke-dasharray="{dash}"/>'
        if legend is None or number in legend:
            entries.append(f'<li><svg class="swatch line" style="{style}" width="22" height="10" aria-hidden="true">'
                      f"{swatch}</svg>{escape(line.name)}</li>")  # fmt: skip
    # A line alone is what the title says.
    names = f'<ul class="legend">{"".join(entries)}</ul>' if len(finite) > 1 else ""
    return _figure(title, names, "".join(parts) + "</svg>")


def heat_map(title: str, scores: Sequence[Sequence[float | None]], removed: Mapping[int, Sequence[int]]) -> str:
    """A figure of scores, layers down and heads across; removed heads are crossed out.

    Args:
        scores: one row a layer, higher = keep; `None` where the layer has no such head.
        removed: heads of each layer.
    """
    known = [score for row in scores for score in row if score is not None and math.isfinite(score)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    colours = matplotlib.colormaps["viridis"]
    columns = max((len(row) for row in scores), default=0)
    left, top = 48, 8
    width, height = left + columns * CELL + 8, top + len(scores) * CELL + 40
    parts = [f'<svg width="{width}" height="{height}" role="img" aria-label="{escape(title)}">']
    for layer, row in enumerate(scores):
        y = top + layer * CELL
        parts.append(f'<text x="{left - 8}" y="{y + CELL / 2 + 4}" text-anchor="end">{layer}</text>')
        for head, score in enumerate(row):
            x = left + head * CELL
            if score is None or not math.isfinite(score):
                parts.append(f'<rect class="absent" x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"/>')
                continue
            gone = head in removed.get(layer, ())
            share = (score - low) / (high - low) if high > low else 0.5
            text = f"layer {layer}, head {head}: {score:.6g}{', removed' if gone else ''}"
            parts.append(f'<g><title>{text}</title><rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" '
                         f'rx="3" fill="{to_hex(colours(share))}"/>')  # fmt: skip
            if gone:
                # White on dark: seen on every colour of the map, and on paper.
                cross = f"M{x + 6} {y + 6}l{CELL - 14} {CELL - 14}m0 {14 - CELL}l{14 - CELL} {CELL - 14}"
                parts.append(f'<path d="{cross}" stroke="#111" stroke-width="5"/>')
                parts.append(f'<path d="{cross}" stroke="#fff" stroke-width="2.2"/>')
            parts.append("</g>")
    for head in range(columns):
        x = left + head * CELL + CELL / 2 - 1
        parts.append(f'<text x="{x}" y="{height - 24}" text-anchor="middle">{head}</text>')
    parts.append(f'<text x="{left + columns * CELL / 2}" y="{height - 6}" text-anchor="middle">head</text>')
    parts.append(f'<text transform="translate(12 {top + len(scores) * CELL / 2}) rotate(-90)" text-anchor="middle">'
                 "layer</text></svg>")  # fmt: skip
    stops = ", ".join(to_hex(colours(i / 8)) for i in range(9))
    legend = (
        f'<ul class="legend"><li>{low:.3g}<span class="bar" style="background:linear-gradient(to right,{stops})">'
        f'</span>{high:.3g}, higher = keep</li><li><span class="cross">&times;</span> removed</li></ul>'
    )
    return _figure(title, legend, f'<div class="scroll" tabindex="0">{"".join(parts)}</div>', "heat")


def _figure(title: str, legend: str, body: str, kind: str = "chart") -> str:
    return f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>{legend}{body}</figure>'


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    """Round numbers that enclose both."""
    if low == high:
        around = abs(low) / 10 or 1.0
        low, high = low - around, high + around
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=integer)
    return [float(tick) for tick in locator.tick_values(low, high)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    """Short, and without the rounding that ticks carry."""
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}".replace("e-0", "e-")
    return text.replace("-", "&minus;")


def _stroke(line: Line, number: int) -> tuple[str, str]:
    """Style and dashes: of a sequence a shade of one scale, else a colour and a pattern, for those who see none."""
    if line.ramp is None:
        return f"--c:var(--line-{number % COLOURS})", DASHES[number % len(DASHES)]
    colours = matplotlib.colormaps["viridis"]
    # Away from the end that the background swallows: the bright one on white, the dark one on black.
    light, dark = to_hex(colours(0.8 * line.ramp)), to_hex(colours(0.35 + 0.6 * line.ramp))
    return f"--light:{light};--dark:{dark};--c:var(--ramp)", "none"
