"""Test files, saved datasets and odd texts: what is read, and what is refused."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import create_autospec

import datasets
import finetune_glue
import pytest
import torch
from support.glue_files import texts_of, tiny_checkpoint, tiny_tokenizer, write_glue, write_task, write_test
from support.task_runs import flags, server_file
from transformers import AutoModel, RobertaConfig, RobertaModel

from hf_attnkit.experiment.glue.data import load_glue, load_test
from hf_attnkit.experiment.glue.tasks import BENCHMARK, TASKS
from hf_attnkit.models.positions import positions

FILES = {
    "cola": ["CoLA.tsv"], "sst2": ["SST-2.tsv"], "mrpc": ["MRPC.tsv"], "stsb": ["STS-B.tsv"], "qqp": ["QQP.tsv"],
    "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv"], "qnli": ["QNLI.tsv"], "rte": ["RTE.tsv"], "wnli": ["WNLI.tsv"],
    "ax": ["AX.tsv"],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), *BENCHMARK)


def run(module, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()
    return json.loads((Path(arguments[arguments.index("--output_dir") + 1]) / "results.json").read_text())


@pytest.mark.parametrize("name", BENCHMARK)
def test_test_files_are_read_in_every_layout(name, tmp_path) -> None:
    expected = write_test(tmp_path / TASKS[name].folder, name)
    with pytest.warns(UserWarning, match="AX") if name == "mnli" else nullcontext():
        tests = load_test(name, tmp_path)
    assert list(tests) == FILES[name]
    assert [rows.to_dict() for rows in tests.values()] == list(expected.values())


def saved(folder: Path, name: str, **changes) -> Path:
    """What `save_to_disk` leaves of a task as the hub has it; `changes` are columns of the training split."""
    splits = {}
    for split in ("train", *TASKS[name].dev_splits, *TASKS[name].test_splits):
        columns: dict[str, list] = dict(texts_of(name, split, 6))
        labels = [0.0, 3.8, 5.0] if name == "stsb" else [0, 1, TASKS[name].num_labels - 1]
        columns["label"] = [-1.0 if name == "stsb" else -1] * 6 if split.startswith("test") else labels * 2
        columns |= {"idx": list(range(6))} | (changes if split == "train" else {})
        splits[split] = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("name", BENCHMARK)
@pytest.mark.parametrize("place", [".", "name", "folder"])
def test_a_saved_dataset_is_read_as_the_hubs_is(name, place, tmp_path) -> None:
    saved(tmp_path / {".": ".", "name": name, "folder": TASKS[name].folder}[place], name)
    loaded = load_glue(name, tmp_path)
    assert list(loaded) == ["train", *TASKS[name].dev_splits]
    for split, rows in loaded.items():
        assert rows.column_names == [*TASKS[name].text_columns, "label"]
        assert {column: rows[column][:] for column in TASKS[name].text_columns} == texts_of(name, split, 6)
    label = loaded["train"].features["label"]
    assert label == datasets.Value("float32") if name == "stsb" else tuple(label.names) == TASKS[name].label_names
    with pytest.warns(UserWarning, match="AX") if name == "mnli" else nullcontext():
        tests = load_test(name, tmp_path)
    assert list(tests) == FILES[name]
    for split, rows in zip(TASKS[name].test_splits, tests.values(), strict=True):
        assert rows.to_dict() == texts_of(name, split, 6)


def test_a_run_on_a_saved_dataset(checkpoint, tmp_path, monkeypatch) -> None:
    saved(tmp_path / "data" / "mnli", "mnli")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(texts_of("ax", "test", 5))}).save_to_disk(
        tmp_path / "data" / "ax"
    )
    arguments = flags(checkpoint, "mnli", tmp_path / "data", tmp_path / "out", "--predict")
    assert run(finetune_glue, monkeypatch, arguments)["predictions"][-1] == "predictions/AX.tsv"
    written = (tmp_path / "out/predictions/MNLI-mm.tsv").read_text()
    assert written == server_file(tmp_path / "out", "mnli", "test_mismatched", 6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cola", {"label": [0, 1, 7, 1, 0, -1]}, r"'train', row 2: label 7 is not 0 \(unacceptable\).*1 more"),
        ("mnli", {"label": [0, 1, 2, -1, 0, 1]}, "row 3: label -1"),
        ("rte", {"label": ["entailment"] * 6}, "row 0: label 'entailment' is not 0 "),
        ("rte", {"label": [0, 1, None, 0, 1, 0]}, "row 2: label None"),
        ("stsb", {"label": [0.0, 1.0, 5.5, 1.0, 1.0, 1.0]}, "row 2: label 5.5 is not 0 to 5"),
        ("stsb", {"label": [0.0, float("nan"), 1.0, 1.0, 1.0, 1.0]}, "row 1: label nan"),
        ("cola", {"sentence": ["a", None, "b", "c", "d", "e"]}, "row 1: sentence None is not a text"),
        ("cola", {"sentence": list(range(6))}, "row 0: sentence 0 is not a text"),
    ],
)
def test_bad_rows_of_a_saved_dataset_are_named(name, changes, message, tmp_path) -> None:
    saved(tmp_path / name, name, **changes)
    with pytest.raises(ValueError, match=message):
        load_glue(name, tmp_path)


def test_bad_labels_of_the_hub_are_named(monkeypatch) -> None:
    columns = {"sentence": ["a", "b"], "label": [1, -1]}
    splits = {split: datasets.Dataset.from_dict(columns) for split in ("train", "validation", "test")}
    fake = create_autospec(datasets.load_dataset, side_effect=lambda *_: datasets.DatasetDict(splits))
    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(ValueError, match=r"nyu-mll/glue, split 'train', row 1: label -1"):
        load_glue("sst2")
    splits["train"] = splits["train"].select([])
    with pytest.raises(ValueError, match="split 'train' is empty"):
        load_glue("sst2")


def test_classes_in_another_order_are_refused(tmp_path) -> None:
    saved(tmp_path, "rte")
    loaded = datasets.load_from_disk(tmp_path)
    other = datasets.ClassLabel(names=["not_entailment", "entailment"])
    loaded = datasets.DatasetDict({split: rows.select(range(2)) for split, rows in loaded.items() if split != "test"})
    loaded.cast_column("label", other).save_to_disk(tmp_path / "rte")
    with pytest.raises(ValueError, match=r"classes are \['not_entailment', 'entailment'\].*in this order"):
        load_glue("rte", tmp_path)


def test_saved_datasets_that_lack_something_are_named(tmp_path) -> None:
    saved(tmp_path, "cola")
    whole = datasets.load_from_disk(tmp_path)
    whole["train"].save_to_disk(tmp_path / "single")
    with pytest.raises(ValueError, match="holds one split"):
        load_glue("cola", tmp_path / "single")
    datasets.DatasetDict(train=whole["train"]).save_to_disk(tmp_path / "few")
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_glue("cola", tmp_path / "few")
    with pytest.raises(ValueError, match=r"no split 'test'.*leave --predict out"):
        load_test("cola", tmp_path / "few")
    whole.remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(ValueError, match=r"lacks the columns \['label'\]"):
        load_glue("cola", tmp_path / "unlabelled")


@pytest.mark.parametrize(("kept", "written"), [(".", "CoLA"), ("cola", "CoLA"), ("cola", "."), (".", ".")])
def test_a_folder_with_both_kinds_of_files_is_refused(kept, written, tmp_path) -> None:
    saved(tmp_path / kept, "cola")
    write_task(tmp_path / written, "cola")
    with pytest.raises(ValueError, match=r"'cola' twice.*train\.tsv"):
        load_glue("cola", tmp_path)


def odd_task(folder: Path, sentences: list[str]) -> Path:
    rows = "".join(f"s\t{i % 2}\t\t{sentence}\n" for i, sentence in enumerate(sentences))
    folder.mkdir()
    (folder / "train.tsv").write_text(rows)
    (folder / "dev.tsv").write_text("s\t1\t\ta b\ns\t0\t\tc d\n")
    return folder


def test_blank_and_long_texts_are_counted_and_used(checkpoint, tmp_path, monkeypatch) -> None:
    # With [CLS] and [SEP]: 48 tokens fit, 49 are one too many.
    data = odd_task(tmp_path / "data", ["a b", "", "   ", "a " * 46, "a " * 47, "a b", "a b", "a b"])
    with pytest.warns(UserWarning) as seen:
        length = ("--max_length", "48")
        results = run(finetune_glue, monkeypatch, flags(checkpoint, "cola", data, tmp_path / "out", *length))
    told = [str(warning.message) for warning in seen]
    assert "train: 1 of 8 inputs are longer than --max_length 48 tokens and truncated (12.5%)" in told
    assert "train: 2 of 8 examples have a blank text (25.0%)" in told
    assert not any(text.startswith("validation:") for text in told)
    assert results["train_samples"] == 8


def test_texts_without_a_token_are_refused(checkpoint, tmp_path, monkeypatch) -> None:
    data = odd_task(tmp_path / "data", ["a b", "c", " ", "d"])
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # as Llama's without its start token
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="train, row 2: the text has no token"):
        run(finetune_glue, monkeypatch, flags(tmp_path / "model", "cola", data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (97, "max_length 97 is longer than the model's 96 positions"),
        (2, "max_length 2 leaves no room next to 2 special tokens"),
    ],
)
def test_lengths_that_cannot_be_are_refused(length, message, glue, checkpoint, tmp_path, monkeypatch) -> None:
    arguments = flags(checkpoint, "cola", glue, tmp_path / "out", "--max_length", str(length))
    with pytest.raises(ValueError, match=message):
        run(finetune_glue, monkeypatch, arguments)
    assert not (tmp_path / "out").exists()


def test_roberta_numbers_fewer_tokens_than_its_table_has_rows() -> None:
    config = RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=8, max_position_embeddings=34, pad_token_id=1)  # fmt: skip
    model = RobertaModel(config).eval()
    most = positions(model)
    assert most == 32
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))
