"""Labelled splits from TSV files, from the hub and from the demo; and what is refused."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import create_autospec

import datasets
import pytest
from support.glue_files import HEADERS, rows_of, write_task

from hf_attnkit.experiment.glue.data import load_glue
from hf_attnkit.experiment.glue.tasks import TASKS

GLUE = [name for name in TASKS if name not in ("ax", "demo")]
REAL = Path(__file__).parents[4] / "shared" / "glue"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no GLUE data at {REAL}")


def check(loaded: datasets.DatasetDict, expected: dict[str, dict[str, list]]) -> None:
    assert list(loaded) == list(expected)
    for split, columns in expected.items():
        assert loaded[split].column_names == list(columns)
        for column, values in columns.items():
            read = list(loaded[split][column])
            assert read == (pytest.approx(values) if column == "label" else values)


@pytest.mark.parametrize("name", GLUE)
def test_every_layout_is_read_from_the_folder_of_all_tasks(name, tmp_path):
    expected = write_task(tmp_path / TASKS[name].folder, name)
    loaded = load_glue(name, tmp_path)
    check(loaded, expected)
    label = loaded["train"].features["label"]
    if name == "stsb":
        assert label == datasets.Value("float32")
    else:
        assert tuple(label.names) == TASKS[name].label_names
        assert all(type(value) is int for value in loaded["train"]["label"])


@pytest.mark.parametrize("name", GLUE)
def test_every_layout_is_read_from_the_tasks_own_folder(name, tmp_path):
    expected = write_task(tmp_path, name)
    check(load_glue(name, str(tmp_path)), expected)


def test_mnli_has_two_development_splits(tmp_path):
    write_task(tmp_path, "mnli")
    loaded = load_glue("mnli", tmp_path)
    assert " ".join(loaded) == "train validation_matched validation_mismatched"
    assert loaded["validation_matched"]["premise"][0].startswith("validation_matched premise 0")
    assert loaded["validation_mismatched"]["premise"][0].startswith("validation_mismatched premise")


@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli"])
@pytest.mark.parametrize("style", [{"start": "\ufeff"}, {"end": "\r\n"}])
def test_byte_order_mark_and_windows_line_ends_are_not_part_of_the_text(name, style, tmp_path):
    expected = write_task(tmp_path, name, **style)
    check(load_glue(name, tmp_path), expected)


def test_the_last_line_may_lack_its_line_end(tmp_path):
    expected = write_task(tmp_path, "cola")
    content = (tmp_path / "dev.tsv").read_bytes()
    (tmp_path / "dev.tsv").write_bytes(content.removesuffix(b"\n"))
    check(load_glue("cola", tmp_path), expected)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not an existing folder.*CoLA/train"):
        load_glue("cola", tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path):
    write_task(tmp_path, "cola")
    with pytest.raises(FileNotFoundError, match=r"train\.tsv' is not an existing folder"):
        load_glue("cola", tmp_path / "train.tsv")


def test_folder_without_the_tasks_files_names_the_files_and_the_places(tmp_path):
    write_task(tmp_path / "MNLI", "mnli")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_glue("mnli", tmp_path)
    message = str(error.value)
    assert "needs train.tsv, dev_matched.tsv, dev_mismatched.tsv" in message
    assert f"{tmp_path / 'MNLI'} (lacks dev_mismatched.tsv)" in message
    assert f"{tmp_path} (lacks train.tsv, dev_matched.tsv, dev_mismatched.tsv)" in message
    assert "Point data_dir at" in message


def test_the_splits_are_not_collected_from_two_folders(tmp_path):
    write_task(tmp_path, "cola")
    write_task(tmp_path / "CoLA", "cola")
    (tmp_path / "dev.tsv").unlink()
    (tmp_path / "CoLA" / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"CoLA \(lacks train\.tsv\) and .*lacks dev\.tsv"):
        load_glue("cola", tmp_path)


def refused(name: str, folder: Path, file: str, content: bytes) -> str:
    """The message for a task whose one file is replaced by `content`; the file must be named."""
    write_task(folder, name)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_glue(name, folder)
    assert str(folder / file) in str(error.value)
    return str(error.value)


def test_row_with_a_missing_column_without_header(tmp_path):
    message = refused("cola", tmp_path, "dev.tsv", b"s\t1\t\tfine\ns\t1\tno text\n")
    assert "line 2: found 3 columns, expected 4" in message
    assert "repair or delete" in message


@pytest.mark.parametrize(("row", "found"), [("3 1 2 alone?", 4), ("3 1 2 a? b? c? 1", 7)])
def test_row_with_another_number_of_columns_than_the_header(row, found, tmp_path):
    lines = [" ".join(HEADERS["qqp"]), "3 1 2 a? b? 1", row, ""]
    content = "\n".join(lines).replace(" ", "\t").encode()
    message = refused("qqp", tmp_path, "train.tsv", content)
    assert f"line 3: found {found} columns, expected 6" in message


def test_blank_line_inside_is_refused(tmp_path):
    message = refused("sst2", tmp_path, "dev.tsv", b"sentence\tlabel\na\t1\n\nb\t0\n")
    assert "line 3: found 1 columns, expected 2" in message


def test_other_bad_lines_are_counted(tmp_path):
    rows = [b"sentence\tlabel", b"a\t1", *[b"bad"] * 8, b"b\t9", b""]
    message = refused("sst2", tmp_path, "train.tsv", b"\n".join(rows))
    assert "line 3: found 1 columns" in message
    assert "8 more, at line 4, 5, 6, 7, 8)" in message


@pytest.mark.parametrize("name", [name for name in GLUE if name != "cola"])
def test_missing_header_column(name, tmp_path):
    lost = TASKS[name].tsv.label_field
    header = [field for field in HEADERS[name] if field != lost]
    message = refused(name, tmp_path, "train.tsv", "\t".join(header).encode() + b"\n")
    assert f"line 1: the header lacks ['{lost}']" in message
    assert str(header) in message
    assert "restore the benchmark's header" in message


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("cola", "2", "0, 1"),
        ("sst2", "positive", "0, 1"),
        ("wnli", "", "0, 1"),
        ("rte", "1", "entailment, not_entailment"),
        ("qnli", "neutral", "entailment, not_entailment"),
        ("mnli", "-", "entailment, neutral, contradiction"),
        ("stsb", "5.01", "a number from 0 to 5"),
        ("stsb", "-0.2", "a number from 0 to 5"),
        ("stsb", "nan", "a number from 0 to 5"),
        ("stsb", "high", "a number from 0 to 5"),
    ],
)
def test_label_that_the_task_does_not_have(name, value, allowed, tmp_path):
    rows, _ = rows_of(name, "train")
    position = 1 if name == "cola" else HEADERS[name].index(TASKS[name].tsv.label_field)
    rows[2][position] = value
    content = "".join("\t".join(row) + "\n" for row in rows).encode()
    message = refused(name, tmp_path, "train.tsv", content)
    assert f"line 3: label {value!r} is not one of: {allowed}" in message


@pytest.mark.parametrize("name", ["cola", "sst2"])
def test_empty_file(name, tmp_path):
    assert "is empty" in refused(name, tmp_path, "dev.tsv", b"")


def test_file_with_only_a_header(tmp_path):
    message = refused("sst2", tmp_path, "dev.tsv", b"sentence\tlabel\n")
    assert "is empty: it needs at least one example of task 'sst2'" in message


def test_invalid_utf8(tmp_path):
    message = refused("sst2", tmp_path, "dev.tsv", b"sentence\tlabel\nok\t1\ncaf\xe9\t0\n")
    assert "line 3: byte 0xe9 at position 3 is not UTF-8: save the file as UTF-8" in message


def test_another_tasks_folder_is_refused(tmp_path):
    write_task(tmp_path, "wnli")
    with pytest.raises(ValueError, match=r"label '1' is not one of: entailment, not_entailment"):
        load_glue("rte", tmp_path)


def test_demo_takes_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir=.*'demo'.*leave data_dir out"):
        load_glue("demo", tmp_path)


# The other two sources.


def hub_copy(name: str) -> datasets.DatasetDict:
    """What the hub gives: an extra column `idx`, and a test split without labels."""
    task = TASKS[name]
    content = {column: [f"{column} {i}" for i in range(2)] for column in task.text_columns}
    splits = ("train", *task.dev_splits, "test")
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {**content, "label": [-1, -1] if split == "test" else [1, 0], "idx": [0, 1]}
            )
            for split in splits
        }
    )


@pytest.mark.parametrize("name", GLUE)
def test_hub_source_keeps_the_labelled_splits_and_the_columns(name, monkeypatch):
    asked = []
    fake = create_autospec(datasets.load_dataset, side_effect=lambda *names: asked.append(names) or hub_copy(name))
    monkeypatch.setattr(datasets, "load_dataset", fake)
    loaded = load_glue(name)
    assert asked == [("nyu-mll/glue", name)]
    assert list(loaded) == ["train", *TASKS[name].dev_splits]
    for split in loaded.values():
        assert split.column_names == [*TASKS[name].text_columns, "label"]
        assert list(split["label"]) == [1, 0]


def test_hub_out_of_reach_points_to_data_dir(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'rte'.*no route.*data_dir.*RTE/train\.tsv"):
        load_glue("rte")


def test_demo_source():
    loaded = load_glue("demo")
    assert {split: rows.num_rows for split, rows in loaded.items()} == {
        "train": 2000,
        "validation": 500,
    }
    assert all(rows.column_names == ["sentence", "label"] for rows in loaded.values())


# The real files, where they are.


@needs_real
@pytest.mark.parametrize(
    ("name", "label", "texts", "header"),
    [("cola", 1, [3], 0), ("sst2", 1, [0], 1), ("mrpc", 0, [3, 4], 1)],
)
def test_real_files(name, label, texts, header):
    folder = REAL / TASKS[name].folder
    loaded = load_glue(name, REAL)
    for split, file in (("train", "train.tsv"), ("validation", "dev.tsv")):
        lines = (folder / file).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        rows = [line.split("\t") for line in lines[header:]]
        assert len(rows) == loaded[split].num_rows > 400
        read = loaded[split].to_dict()
        assert [int(row[label]) for row in rows] == read["label"]
        for column, position in zip(TASKS[name].text_columns, texts, strict=True):
            assert [row[position] for row in rows] == read[column]
