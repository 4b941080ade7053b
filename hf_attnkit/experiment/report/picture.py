"""Leave a picture in one step: a reader sees the old file or the whole new one."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)
