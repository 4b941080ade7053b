"""Rows of text as a table in which columns line up."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """One line for each row, headings first; columns that are empty but for their heading are left out."""
    columns = [column for column in zip(*rows, strict=True) if len(rows) == 1 or any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
