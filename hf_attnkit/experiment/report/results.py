"""Read results.json, as it may be published: no text of it holds the path of a folder on this machine."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hf_attnkit.experiment.report.schema import Required, Results

# A path from the root or from a home, or an address, which stays. What stands before it may be a bracket or "=", but
# no part of a relative path, of a number such as 1/2 or of a closing tag.
_PLACE = re.compile(
    r"(?P<address>\b(?!file:)[a-z][a-z0-9+.-]*://\S*)"
    r"|(?:file:/*|(?<![\w./~<\\]))(?:(?:~\w*|[A-Za-z]:)?/(?=\w|\.\w)|[A-Za-z]:\\|\\\\)(?P<path>[^\s'\"<>|]*)"
)
_WHOLE = re.compile(r"(?:file:/*|~\w*|[A-Za-z]:)?[/\\][^\n]*\w[^\n]*")  # with spaces in it


def read_results(folder: Path) -> Results:
    """The results of a finished run.

    Raises:
        FileNotFoundError: if the folder has no results.json.
        ValueError: if they are those of several runs, or of a version that did not say what was changed.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no results.json: name the --output_dir of a finished run")
    found = json.loads(file.read_text(encoding="utf-8"))
    if "runs" in found:
        raise ValueError(
            f"{file} holds the means of several runs: name the folder of one of them, such as "
            f"{next(iter(found['runs']), 'task/seed-0')}"
        )
    return public(found, str(file))


def public(results: Mapping[str, Any], called: str = "results") -> Results:
    """The same without folders of this machine: of an absolute path the last component is left.

    Raises:
        ValueError: if something is missing, which is so in files of earlier versions.
    """
    missing = [key for key in Required.__annotations__ if key not in results]
    missing += [key for key in ("model", "data") if key in results and not isinstance(results[key], Mapping)]
    if missing:
        raise ValueError(
            f"{called} lacks {', '.join(missing)} as this version of hf_attnkit writes it. An earlier version wrote it "
            "and did not record what was changed and on which data: run the recipe again, or use that version"
        )
    return cast(Results, without_folders({**results, "command": _without_folders_in_command(results["command"])}))


def _without_folders_in_command(command: str) -> str:
    """Word by word, since a path may have spaces in it."""
    words = (word.partition("=") for word in shlex.split(command))
    return shlex.join("".join(without_folders(part) for part in word) for word in words)


def without_folders(value: Any) -> Any:
    """Texts in dictionaries and lists, keys too, with the last component of each absolute path in its place."""
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(part) for part in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value):
        return _last(value)
    return _PLACE.sub(lambda found: found["address"] or _last(found["path"]), value)


def _last(path: str) -> str:
    """The last component, with what follows it in a text."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
