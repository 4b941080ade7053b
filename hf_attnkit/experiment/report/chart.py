"""Lines over training steps: where everything is, as the template line_chart.svg draws it.

Nothing has a colour of its own but what means something: the style sheet of the page colours the rest, so that a chart
is right in light, in dark and on paper. Numbers are in hover titles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 72, WIDTH - 16, 12, HEIGHT - 44  # edges of the plot
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


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the picture's units, and what is written there."""

    place: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point that says its number."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class DrawnLine:
    """A line in the picture's units."""

    name: str
    path: str
    style: str
    dash: str
    radius: int
    dots: list[Dot]
    in_legend: bool


@dataclass(frozen=True)
class Chart:
    """A figure: lines and axes, the horizontal one in optimizer steps; or numbers, where there is a point and no line.

    Attributes:
        numbers: name -> number, of lines of one point each; then there are no lines.
    """

    title: str
    unit: str
    lines: list[DrawnLine]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    numbers: dict[str, str]


def line_chart(title: str, unit: str, lines: Sequence[Line], legend: Collection[int] | None = None) -> Chart:
    """Lay out a chart.

    Args:
        unit: label of the vertical axis.
        legend: numbers of the lines that the legend names; all by default.
    """
    finite = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.ramp) for line in lines]
    finite = [line for line in finite if line.points]
    if all(len(line.points) == 1 for line in finite):
        numbers = {line.name: f"{number(value)} at step {number(step)}" for line in finite
                   for step, value in line.points}  # fmt: skip
        return Chart(title, unit, [], [], [], numbers)
    xs, ys = ([point[axis] for line in finite for point in line.points] for axis in (0, 1))
    # Whole steps from the run's start to its last, on values between round numbers.
    last = max(*xs, 1)
    x_ticks, y_ticks = [tick for tick in _ticks(0, last, integer=True) if tick <= last], _ticks(min(ys), max(ys))
    x, y = _scale(0, last, LEFT, RIGHT), _scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    drawn = []
    for place, line in enumerate(finite):
        style, dash = _stroke(line, place)
        drawn.append(
            DrawnLine(
                name=line.name,
                path="M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line.points),
                style=style,
                dash=dash,
                radius=3 if len(line.points) <= 30 else 2,
                dots=[
                    Dot(round(x(a), 1), round(y(b), 1), f"{line.name}, step {number(a)}: {b:.6g}")
                    for a, b in line.points[:: math.ceil(len(line.points) / DOTS)]
                ],
                in_legend=len(finite) > 1 and (legend is None or place in legend),  # the title names a line alone
            )
        )
    return Chart(
        title,
        unit,
        drawn,
        [Tick(round(x(tick), 1), number(tick)) for tick in x_ticks],
        [Tick(round(y(tick), 1), number(tick)) for tick in y_ticks],
        {},
    )


def number(value: float) -> str:
    """Short, and without the rounding that ticks carry."""
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}".replace("e-0", "e-")
    return text.replace("-", "\N{MINUS SIGN}")


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    """Round numbers that enclose both."""
    if low == high:
        around = abs(low) / 10 or 1.0
        low, high = low - around, high + around
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=integer)
    return [float(tick) for tick in locator.tick_values(low, high)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _stroke(line: Line, place: int) -> tuple[str, str]:
    """Style and dashes: of a sequence a shade of one scale, else a colour and a pattern, for those who see none."""
    if line.ramp is None:
        return f"--c:var(--line-{place % COLOURS})", DASHES[place % len(DASHES)]
    colours = matplotlib.colormaps["viridis"]
    # Away from the end that the background swallows: the bright one on white, the dark one on black.
    light, dark = to_hex(colours(0.8 * line.ramp)), to_hex(colours(0.35 + 0.6 * line.ramp))
    return f"--light:{light};--dark:{dark};--c:var(--ramp)", "none"
