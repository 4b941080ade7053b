"""The stages of a run as a table on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_attnkit.experiment.files import show
from hf_attnkit.experiment.report.results import public
from hf_attnkit.experiment.report.stage_table import stage_table
from hf_attnkit.experiment.report.summary import comparison, title


def print_stages(results: Mapping[str, Any]) -> None:
    """Print the stages of a run; nothing where none was measured.

    Args:
        results: what results.json holds.
    """
    found = public(results)
    header, rows = stage_table(found["stages"], found["timing"], found["control"])
    if not rows:
        return
    table = Table(title=escape(title(found)), caption=escape(comparison(found)) or None, caption_justify="left")
    for place, name in enumerate(header):
        table.add_column(escape(name), justify="left" if place == 0 else "right")
    for row in rows:
        # A terminal is narrow: the ratio's quartiles are told, differences are on the page.
        table.add_row(*(escape(str(cell) if name == "time ratio" else cell.text)
                        for name, cell in zip(header, row, strict=True)))  # fmt: skip
    show(table)
