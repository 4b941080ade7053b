"""Files of recipes: texts read, results written in one step, a table printed in full."""

from __future__ import annotations

import itertools
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


def show(table: Table, width: int = 120) -> None:
    """Print a table in full also where the output is no terminal (rich then assumes 80 columns)."""
    console = Console()
    Console(width=max(console.width, width)).print(table)


def read_texts(path: Path, number: int) -> list[str]:
    """The file's first texts, empty lines left out.

    Raises:
        ValueError: if there are none.
    """
    with open(path, encoding="utf-8") as lines:
        texts = list(itertools.islice((line.strip() for line in lines if line.strip()), number))
    if not texts:
        raise ValueError(f"--text_file {path} holds no text")
    return texts
