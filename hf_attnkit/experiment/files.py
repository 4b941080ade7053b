"""How recipes leave results: a file written in one step, a table printed in full."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write_text(path: Path, content: str) -> None:
    """Write in one step: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of `content` as JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def show(table: Table) -> None:
    """Print a table in full also where the output is no terminal (rich then assumes 80 columns)."""
    console = Console()
    Console(width=max(console.width, 120)).print(table)
