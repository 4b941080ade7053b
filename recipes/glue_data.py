"""Load one GLUE task (Wang et al. 2018) from the hub or from the benchmark's own TSV files.

The files have no CSV quoting: a quote is a character of the text, and only a tab ends a column.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
from demo_data import make_demo_data
from glue_tasks import Task, get_task

_HUB_NAME = "nyu-mll/glue"


def load_glue(task_name: str, data_dir: str | os.PathLike | None = None) -> datasets.DatasetDict:
    """Load the labelled splits of one task.

    Args:
        task_name: A name in `glue_tasks.TASKS`. `"demo"` gives this project's own sentences
            (`demo_data.py`), which are not GLUE.
        data_dir: `None` loads `nyu-mll/glue` from the hub. A folder is read in the benchmark's TSV
            layout: either the folder of all tasks (`data_dir/CoLA/train.tsv`) or the task's own
            (`data_dir/train.tsv`); the first wins if both are there.

    Returns:
        Splits `train` and `validation` (mnli: `train`, `validation_matched` and
        `validation_mismatched`). Columns: the task's text columns (str) and `label`, a class id
        with its names (`ClassLabel`), or a float32 from 0 to 5 for stsb. Rows keep the files'
        order; texts are kept as written, spaces and quotes included.

    Raises:
        ValueError: An unknown task; `data_dir` with `demo`; or a file that breaks the layout: it is
            empty, is not UTF-8, lacks a header column, has a row with too few or too many columns,
            or a label that the task does not have. The message names file and line. All files are
            checked before anything is returned.
        FileNotFoundError: `data_dir` is no folder or lacks the task's files, or the hub cannot be
            reached.
    """
    task = get_task(task_name)
    columns = [*task.text_columns, "label"]
    if task.tsv is None:
        if data_dir is not None:
            raise ValueError(
                f"data_dir={str(data_dir)!r} was given with task {task.name!r}, which is made by "
                "recipes/demo_data.py and reads no files: leave data_dir out."
            )
        return make_demo_data().select_columns(columns)
    if data_dir is None:
        return _load_from_hub(task).select_columns(columns)
    files = _find_files(task, Path(data_dir).expanduser())
    rows = {split: _read_tsv(task, path) for split, path in files.items()}
    features = _features(task)
    loaded = datasets.DatasetDict()
    for split, content in rows.items():
        loaded[split] = datasets.Dataset.from_dict(content, features=features, split=split)
    return loaded


def _features(task: Task) -> datasets.Features:
    """Column types, those of the hub."""
    texts = {column: datasets.Value("string") for column in task.text_columns}
    if task.is_regression:
        return datasets.Features({**texts, "label": datasets.Value("float32")})
    return datasets.Features({**texts, "label": datasets.ClassLabel(names=list(task.label_names))})


def _load_from_hub(task: Task) -> datasets.DatasetDict:
    try:
        loaded = datasets.load_dataset(_HUB_NAME, task.name)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"Task {task.name!r} could not be loaded from the hub's {_HUB_NAME} ({error}): go "
            f"online, or give data_dir, a folder with {task.folder}/{task.tsv.train_file}."
        ) from error
    # The hub's test split has no labels: they are all -1.
    return datasets.DatasetDict({split: loaded[split] for split in ("train", *task.dev_splits)})


def _find_files(task: Task, data_dir: Path) -> dict[str, Path]:
    """The file of each split, from the first of the two folders that has them all."""
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"data_dir {str(data_dir)!r} is not an existing folder: give the folder that holds "
            f"{task.folder}/{task.tsv.train_file}, or leave data_dir out to load from the hub."
        )
    splits = ("train", *task.dev_splits)
    names = (task.tsv.train_file, *task.tsv.dev_files)
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


def _read_tsv(task: Task, path: Path) -> dict[str, list]:
    """Columns of one file, each a list over its rows; raises ValueError for the first bad lines."""
    lines = _lines(path)
    where, width = _positions(task, path, lines)
    parse, allowed = _label_parser(task)

    problems = []
    rows = []
    for number, row in lines:
        if len(row) != width:
            problems.append((number, f"found {len(row)} columns, expected {width}"))
            continue
        *texts, written = (row[position] for position in where)
        label = parse(written)
        if label is None:
            problems.append((number, f"label {written!r} is not one of: {allowed}"))
        rows.append((*texts, label))
    if problems:
        others = ", ".join(str(number) for number, _ in problems[1:6])
        more = f" (as bad: {len(problems) - 1} more, at line {others})" if others else ""
        raise ValueError(
            f"{path}, line {problems[0][0]}: {problems[0][1]}{more}. Columns are split at tabs and "
            "quotes mean nothing: repair or delete such lines, or leave data_dir out to load from "
            "the hub."
        )
    if not rows:
        raise _empty(task, path)
    return dict(zip((*task.text_columns, "label"), map(list, zip(*rows, strict=True)), strict=True))


def _positions(
    task: Task,
    path: Path,
    lines: Iterator[tuple[int, list[str]]],
) -> tuple[list[int], int]:
    """Where a row holds the texts and, last, the label; and how many columns it has.

    Takes the header, if the task has one, off `lines`.
    """
    fields = [*task.tsv.text_fields, task.tsv.label_field]
    if task.tsv.columns is not None:
        return fields, task.tsv.columns
    _, header = next(lines, (1, None))
    if header is None:
        raise _empty(task, path)
    absent = [name for name in fields if name not in header]
    if absent:
        raise ValueError(
            f"{path}, line 1: the header lacks {absent}; it has {header}. Task {task.name!r} needs "
            f"{fields}: restore the benchmark's header line."
        )
    return [header.index(name) for name in fields], len(header)


def _empty(task: Task, path: Path) -> ValueError:
    return ValueError(
        f"{path} is empty: it needs at least one example of task {task.name!r}. Fetch it anew, or "
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
    if task.tsv.label_kind == "float":
        return _parse_score, "a number from 0 to 5"
    ids = range(len(task.label_names))
    known = {task.label_names[i] if task.tsv.label_kind == "word" else str(i): i for i in ids}
    return known.get, ", ".join(known)


def _parse_score(written: str) -> float | None:
    try:
        score = float(written)
    except ValueError:
        return None
    return score if 0.0 <= score <= 5.0 else None
