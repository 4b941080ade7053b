"""Read the TSV files of one task as the GLUE benchmark (Wang et al. 2018) distributes them.

The files have no CSV quoting: a quote is a character of the text, and only a tab ends a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_attnkit.experiment.glue.tasks import Task

# Where the diagnostic set is: the benchmark's own download script, others, the file as its site offers it.
_DIAGNOSTIC = ("diagnostic/diagnostic.tsv", "AX/diagnostic.tsv", "AX/AX.tsv", "AX.tsv", "diagnostic.tsv")


def find_files(task: Task, data_dir: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The file of each of these splits, from the first of two folders that has them all.

    Args:
        data_dir: the folder of all tasks or the task's own.

    Raises:
        FileNotFoundError: neither folder has them all; the message says what each lacks.
    """
    if not task.is_labelled:
        found = [data_dir / place for place in _DIAGNOSTIC if (data_dir / place).is_file()]
        if not found:
            raise FileNotFoundError(f"Task {task.name!r} needs one of {', '.join(_DIAGNOSTIC)} in {data_dir}.")
        return {task.test_splits[0]: found[0]}
    names = task.split_files(splits)
    looked = []
    for folder in (data_dir / task.folder, data_dir):
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return {split: folder / name for split, name in zip(splits, names, strict=True)}
        looked.append(f"{folder} (lacks {', '.join(missing)})")
    raise FileNotFoundError(
        f"Task {task.name!r} needs {', '.join(names)} together in one folder; looked in "
        f"{' and '.join(looked)}. Point data_dir at the folder of all tasks or at "
        f"{task.folder} itself, or leave it out to load from the hub."
    )


def read_tsv(task: Task, path: Path, *, labelled: bool) -> dict[str, list[Any]]:
    """The text columns of one file and, if it is labelled, `label`, each a list over its rows.

    Raises:
        ValueError: a file that breaks the layout, with its first bad lines.
    """
    lines = _lines(path)
    where, width, index = _positions(task, path, lines, labelled)
    parse, allowed = _label_parser(task)

    problems = []
    rows = []
    indices = []
    for number, row in lines:
        if len(row) != width:
            problems.append((number, f"found {len(row)} columns, expected {width}"))
            continue
        values: list[Any] = [row[position] for position in where]
        indices += [] if index is None else [row[index]]
        if labelled:
            label = parse(values[-1])
            if label is None:
                problems.append((number, f"label {values[-1]!r} is not one of: {allowed}"))
            values[-1] = label
        rows.append(values)
    if problems:
        others = ", ".join(str(number) for number, _ in problems[1:6])
        more = f" (as bad: {len(problems) - 1} more, at line {others})" if others else ""
        raise ValueError(
            f"{path}, line {problems[0][0]}: {problems[0][1]}{more}. Columns are split at tabs and "
            f"quotes mean nothing: repair {'or delete ' if labelled else ''}such lines, or leave data_dir out to load "
            "from the hub."
        )
    if not labelled:
        require_order(path, indices)
    if not rows:
        raise _empty(task, path)
    columns = (*task.text_columns, "label") if labelled else task.text_columns
    return dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))


def require_order(where: Path | str, indices: Sequence[str | int]) -> None:
    """Raise `ValueError` unless rows that bear their numbers are all there and in order: the server goes by them."""
    for row, index in enumerate(indices):
        if str(index).isdigit() and int(index) != row:
            raise ValueError(
                f"{where}: the example in row {row} (from 0) has the index {index}, but the GLUE server counts all "
                "test examples in order from 0: restore those that are missing or moved"
            )


def _positions(
    task: Task,
    path: Path,
    lines: Iterator[tuple[int, list[str]]],
    labelled: bool,
) -> tuple[Sequence[int], int, int | None]:
    """Where a row holds the texts and, last, a label; how many columns it has; and where its number is, if there.

    Takes the header, if the file has one, off `lines`.
    """
    fields = [*task.layout.text_fields, task.layout.label_field]
    if not labelled:
        fields = [*(task.layout.test_fields or task.layout.text_fields)]
    elif task.layout.columns is not None:
        return fields, task.layout.columns, None
    _, header = next(lines, (1, None))
    if header is None:
        raise _empty(task, path)
    absent = [name for name in fields if name not in header]
    if absent:
        raise ValueError(
            f"{path}, line 1: the header lacks {absent}; it has {header}. Task {task.name!r} needs "
            f"{fields}: restore the benchmark's header line."
        )
    index = 0 if header[0] in ("index", "id") else None
    return [header.index(name) for name in fields], len(header), index


def _empty(task: Task, path: Path) -> ValueError:
    return ValueError(
        f"{path} is empty: it needs at least one example of task {task.name!r}. Download it again, or "
        "leave data_dir out to load from the hub."
    )


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each line's number, from 1, and its columns."""
    # Binary lines end at b"\n" alone; str.splitlines would also cut texts at U+2028, \x0b or \x85.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                # MRPC starts with a byte order mark.
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: byte 0x{raw[error.start]:02x} at position "
                    f"{error.start} is not UTF-8: save the file as UTF-8."
                ) from error
            yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def _label_parser(task: Task) -> tuple[Callable[[str], int | float | None], str]:
    """A function from a written label to its value (`None`: not allowed), and what is allowed."""
    if task.layout.label_kind == "float":
        return _parse_score, "a number from 0 to 5"
    ids = range(len(task.label_names))
    known = {task.label_names[i] if task.layout.label_kind == "word" else str(i): i for i in ids}
    return known.get, ", ".join(known)


def _parse_score(written: str) -> float | None:
    try:
        score = float(written)
    except ValueError:
        return None
    return score if 0.0 <= score <= 5.0 else None
