"""A folder that gets its name when it is whole: what is half written, or was not compared, never has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_free(folder: Path) -> None:
    """Raise `ValueError` unless nothing is there, or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        what = "is no folder" if not folder.is_dir() else f"holds {sorted(p.name for p in folder.iterdir())[0]}"
        raise ValueError(f"the target {str(folder)!r} {what}; name another folder, or remove this one")


@contextmanager
def finished_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write into, next to `folder`; it takes that name at the end, and is removed after an error.

    Of a killed process a folder `.NAME.incomplete-PID` is left.

    Raises:
        ValueError: as `require_free`.
    """
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.parent / f".{folder.name}.incomplete-{os.getpid()}"
    if place.exists():
        shutil.rmtree(place)  # of an earlier process with this number
    place.mkdir()
    try:
        yield place
        os.replace(place, folder)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
