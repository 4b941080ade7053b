"""A picture of head statistics: a heat map for each statistic, layers down and heads across."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from hf_attnkit.analysis.head_statistics import HeadStatistics
from hf_attnkit.experiment.report.picture import save_png

# statistic -> title; all but the first and the third are shares in [0, 1], and share one colour scale.
TITLES = {
    "entropy": "entropy, nats",
    "confidence": "confidence",
    "distance": "distance, tokens",
    "previous": "share on the previous token",
    "next": "share on the next token",
    "first": "share on the first token",
    "separator": "share on separators",
    "redundancy": "overlap with the nearest head",
}
COLUMNS = 4


def draw_statistics(statistics: HeadStatistics, title: str, path: Path) -> None:
    """Write a PNG with each statistic that some head has; places without a number are grey."""
    names = [name for name in TITLES if not getattr(statistics, name).isnan().all()]
    rows, columns = statistics.entropy.shape
    width, height = max(2.8, 0.2 * columns + 1.1), max(2.2, 0.2 * rows + 1.1)
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(width * COLUMNS, height * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        is_share = name not in ("entropy", "distance")
        image = axis.imshow(
            getattr(statistics, name).numpy(), cmap=colours, aspect="auto", vmin=0, vmax=1 if is_share else None
        )
        axis.set_title(TITLES[name], fontsize=10)
        axis.set_xticks(range(0, columns, max(1, columns // 8)))
        axis.set_yticks(range(0, rows, max(1, rows // 8)))
        axis.tick_params(labelsize=8, length=2)
        figure.colorbar(image, ax=axis, pad=0.03).ax.tick_params(labelsize=8, length=2)
    figure.supxlabel("head", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)
