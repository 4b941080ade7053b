"""Load one task from the hub, TSV files in the layout of GLUE (Wang et al. 2018) or a saved `datasets` folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_attnkit.experiment.glue.demo_data import make_demo_data
from hf_attnkit.experiment.glue.tasks import Task, get_task
from hf_attnkit.experiment.glue.tsv import find_files, read_tsv, require_order


def load_glue(
    task_name: str, data_dir: str | os.PathLike[str] | None = None, splits: Sequence[str] | None = None
) -> datasets.DatasetDict:
    """Load labelled splits of one task.

    Args:
        task_name: A name in `tasks.TASKS`, but not `"ax"`, of which nothing is labelled. `"demo"` gives
            this project's own sentences (`demo_data.py`), which are not GLUE.
        data_dir: `None` loads from the hub, GLUE's tasks from `nyu-mll/glue`. A folder holds the benchmark's TSV files
            or what `DatasetDict.save_to_disk` wrote: for all tasks (`data_dir/CoLA/train.tsv`, a saved
            `data_dir/cola`) or for one (`data_dir/train.tsv`, a saved `data_dir`); the first wins if
            both are there.
        splits: Those that are needed, of `train` and the task's `dev_splits`; nothing else has to be there. By default
            all.

    Returns:
        Splits `train` and `validation` (mnli: `train`, `validation_matched` and
        `validation_mismatched`). Columns: the task's text columns (str) and `label`, a class id
        with its names (`ClassLabel`), or a float32 from 0 to 5 for stsb. Rows keep their
        order; texts are kept as written, spaces and quotes included.

    Raises:
        ValueError: An unknown task; `data_dir` with `demo`; a folder with files of both kinds; a TSV file
            that breaks the layout: it is empty, is not UTF-8, lacks a header column, has a row with too
            few or too many columns; a saved dataset without the splits or columns; or a label that the task does
            not have. The message names file and line, or split and row. All is checked before anything is
            returned.
        FileNotFoundError: `data_dir` is no folder or lacks the task's files, or the hub cannot be
            reached.
    """
    task = get_task(task_name)
    splits = ("train", *task.dev_splits) if splits is None else splits
    if task.name == "demo":
        if data_dir is not None:
            raise ValueError(
                f"data_dir={str(data_dir)!r} was given with task {task.name!r}, which is made by "
                "hf_attnkit/experiment/glue/demo_data.py and reads no files: leave data_dir out."
            )
        made = make_demo_data().select_columns([*task.text_columns, "label"])
        return datasets.DatasetDict({split: made[split] for split in splits})
    if not task.is_labelled:
        raise ValueError(f"Task {task.name!r} has no labels to train on or to measure with: use load_test.")
    return _load(task, data_dir, splits, labelled=True)


def load_test(task_name: str, data_dir: str | os.PathLike[str] | None = None) -> dict[str, datasets.Dataset]:
    """Load the splits whose labels GLUE keeps, by the names of the files that its server wants.

    Args:
        task_name, data_dir: As for `load_glue`.

    Returns:
        `{"CoLA.tsv": rows}`; for mnli `MNLI-m.tsv`, `MNLI-mm.tsv` and, where its data is there, `AX.tsv`. Columns: the
        task's text columns. Rows keep their order, which is the `index` of the server.

    Raises:
        ValueError, FileNotFoundError: As `load_glue`, or the task has no test split there, or its rows bear numbers
            that are not all there or not in order.
    """
    task = get_task(task_name)
    if not task.test_splits:
        raise ValueError(f"Task {task.name!r} has no test split to predict: leave --predict out.")
    loaded = _load(task, data_dir, task.test_splits, labelled=False)
    tests = {file: loaded[split] for split, file in zip(task.test_splits, task.prediction_files, strict=True)}
    if task.name == "mnli":
        try:
            return tests | load_test("ax", data_dir)
        except FileNotFoundError as error:
            warnings.warn(f"AX.tsv is not written: {error}", stacklevel=2)
    return tests


def _load(
    task: Task, data_dir: str | os.PathLike[str] | None, splits: Sequence[str], *, labelled: bool
) -> datasets.DatasetDict:
    if data_dir is None:
        return _checked(task, _from_hub(task), splits, f"the hub's {task.hub_path}", labelled=labelled)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir {str(folder)!r} is not an existing folder: give the folder that holds {_first_file(task)}"
            f"{', or leave data_dir out to load from the hub' * (task.hub_path is not None)}."
        )
    saved = _saved_folder(task, folder)
    if saved is not None:
        return _checked(task, datasets.load_from_disk(saved), splits, str(saved), labelled=labelled)
    loaded = datasets.DatasetDict()
    for split, path in find_files(task, folder, splits).items():
        columns = read_tsv(task, path, labelled=labelled)
        loaded[split] = datasets.Dataset.from_dict(columns, features=_features(task, labelled), split=split)
    return loaded


def _features(task: Task, labelled: bool) -> datasets.Features:
    """Column types, those of the hub."""
    columns = {column: datasets.Value("string") for column in task.text_columns}
    if labelled:
        names = list(task.label_names)
        columns["label"] = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=names)
    return datasets.Features(columns)


def _from_hub(task: Task) -> datasets.DatasetDict:
    if task.hub_path is None:
        raise FileNotFoundError(
            f"Task {task.name!r} has no dataset on the hub: give data_dir, a folder with {_first_file(task)}."
        )
    try:
        return datasets.load_dataset(task.hub_path, task.hub_config)
    except (ConnectionError, FileNotFoundError, ValueError) as error:  # the last: a cache without this task, offline
        raise FileNotFoundError(
            f"Task {task.name!r} could not be loaded from the hub's {task.hub_path} ({error}): go "
            f"online, or give data_dir, a folder with {_first_file(task)}."
        ) from error


def _first_file(task: Task) -> str:
    if task.tsv is None:
        return f"{task.folder}/dataset_dict.json"
    return f"{task.folder}/{task.tsv.train_file if task.is_labelled else task.tsv.test_files[0]}"


def _saved_folder(task: Task, data_dir: Path) -> Path | None:
    """The folder in which `save_to_disk` left the task; `None` if there is none."""
    places = [data_dir / task.name, data_dir / task.folder, data_dir]
    saved = next((place for place in places if (place / "dataset_dict.json").is_file()), None)
    if saved == data_dir and not task.is_labelled:
        # mnli's own folder, asked for the diagnostic set.
        splits = json.loads((saved / "dataset_dict.json").read_text())["splits"]
        saved = saved if set(task.test_splits) <= set(splits) else None
    if saved is None:
        single = next((place for place in places if (place / "state.json").is_file()), None)
        if single is not None:
            raise ValueError(
                f"{single} holds one split, saved by Dataset.save_to_disk: save the DatasetDict with its splits "
                f"{', '.join(('train', *task.dev_splits, *task.test_splits))} instead."
            )
        return None
    names = task.split_files(("train", *task.dev_splits, *task.test_splits)) if task.tsv else []
    written = [place / name for place in places for name in names if (place / name).is_file()]
    if written:
        raise ValueError(
            f"data_dir {str(data_dir)!r} has task {task.name!r} twice, as a saved dataset in {saved} and as TSV "
            f"files ({written[0]}): move one of them away, or name the folder of one."
        )
    return saved


def _checked(
    task: Task, loaded: datasets.DatasetDict, splits: Sequence[str], source: str, *, labelled: bool
) -> datasets.DatasetDict:
    """These splits with the task's columns and types, each row looked at."""
    features = _features(task, labelled)
    checked = datasets.DatasetDict()
    for split in splits:
        if split not in loaded:
            remedy = "add it" if labelled else "add it, or leave --predict out"
            raise ValueError(f"{source} has no split {split!r} of task {task.name!r}, only {list(loaded)}: {remedy}.")
        rows, where = loaded[split], f"{source}, split {split!r}"
        absent = [name for name in features if name not in rows.column_names]
        if absent or not rows.num_rows:
            lacks = f"lacks the columns {absent}; it has {rows.column_names}" if absent else "is empty"
            raise ValueError(f"{where} {lacks}: task {task.name!r} needs examples with {list(features)}.")
        if not labelled and "idx" in rows.column_names:
            require_order(where, rows["idx"][:])
        rows = rows.select_columns(list(features))
        for column in task.text_columns:
            _refuse(where, column, rows[column][:], lambda text: isinstance(text, str), "a text")
        if labelled:
            _check_labels(task, rows, where)
        checked[split] = rows if rows.features == features else rows.cast(features)
    return checked


def _check_labels(task: Task, rows: datasets.Dataset, where: str) -> None:
    values = rows["label"][:]
    if task.is_regression:
        _refuse(where, "label", values, lambda score: isinstance(score, (int, float)) and 0 <= score <= 5, "0 to 5")
        return
    names = getattr(rows.features["label"], "names", None)
    if names not in (None, list(task.label_names)):
        raise ValueError(
            f"{where}: the classes are {names}, but those of task {task.name!r} are {list(task.label_names)}, in this "
            "order: save the labels as GLUE numbers them."
        )
    ids = range(task.num_labels)
    allowed = ", ".join(f"{number} ({task.label_names[number]})" for number in ids)
    _refuse(where, "label", values, lambda label: isinstance(label, int) and label in ids, allowed)


def _refuse(where: str, column: str, values: list[Any], allowed: Callable[[Any], bool], expected: str) -> None:
    """Raise `ValueError` for the values that are not allowed, counting rows from 0."""
    wrong = [(row, value) for row, value in enumerate(values) if not allowed(value)]
    if wrong:
        row, value = wrong[0]
        more = f" (as bad: {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
        raise ValueError(f"{where}, row {row}: {column} {value!r} is not {expected}{more}. Repair or drop such rows.")
