"""A picture of head importance: layers down, heads across, removed heads crossed out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_importance(
    maps: Mapping[str, tuple[Tensor, Mapping[int, Iterable[int]]]], path: Path, title: str | None = None
) -> None:
    """Draw one heat map per entry side by side and write a PNG.

    Args:
        maps: name -> (scores `(num_layers, num_heads)`, higher = keep; removed heads per layer).
        title: over all of them.
    """
    rows, columns = (max(scores.shape[dim] for scores, _ in maps.values()) for dim in (0, 1))
    width, height = max(4.0, 0.42 * columns + 1.6), max(2.6, 0.42 * rows + 1.5)
    figure, axes = plt.subplots(1, len(maps), figsize=(width * len(maps), height), squeeze=False, layout="constrained")
    if title is not None:
        figure.suptitle(title)
    for axis, (name, (scores, removed)) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(scores.numpy(), cmap="viridis", aspect="equal")
        for layer, heads in removed.items():
            heads = list(heads)
            axis.scatter(heads, [layer] * len(heads), marker="x", color="white", s=70, linewidths=3)
            axis.scatter(heads, [layer] * len(heads), marker="x", color="crimson", s=60, linewidths=1.6)
        axis.set(title=name, xlabel="head", ylabel="layer", xticks=range(columns), yticks=range(rows))
        figure.colorbar(image, ax=axis, shrink=0.85, label="importance (higher = keep)")
    figure.text(0.005, 0.005, "x = removed", color="crimson", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
