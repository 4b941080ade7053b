"""Every GLUE task end to end from its files, and the predictions that the GLUE server takes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import datasets
import finetune_glue
import numpy as np
import pytest
import torch
import uptrain_gqa_glue
from compare import conversions_glue as compare_conversions_glue
from compare import pruning_glue as compare_pruning_glue
from support.fakes import never
from support.glue_files import tiny_checkpoint, write_glue, write_task, write_test
from support.task_runs import flags, same_predictions, server_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_attnkit
from hf_attnkit.experiment.glue.data import load_glue, load_test
from hf_attnkit.experiment.glue.predictions import write_predictions
from hf_attnkit.experiment.glue.run import GlueRun
from hf_attnkit.experiment.glue.tasks import BENCHMARK, TASKS

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


@pytest.mark.parametrize("task", BENCHMARK)
def test_every_task_trains_measures_and_predicts_from_its_files(task, glue, checkpoint, tmp_path, monkeypatch) -> None:
    # Grouped by length Trainer reads evaluation rows in another order: the files must not have it.
    more = ("--predict", "--train_sampling_strategy", "group_by_length")
    results = run(finetune_glue, monkeypatch, flags(checkpoint, task, glue, tmp_path, *more))
    (stage,) = results["stages"]
    ends = ["_matched", "_mismatched"] if task == "mnli" else [""]
    assert set(stage["metrics"]) == {f"{metric}{end}" for metric in TASKS[task].metrics for end in ends}
    assert results["train_samples"] == 12 and stage["dev_samples"] == 12 * len(ends)
    assert results["data"]["is_benchmark"] and results["data"]["name"] == TASKS[task].folder
    assert results["data"]["hub_path"] == "local" and results["data"]["config"] == task
    assert results["data"]["splits"] == {"train": "train", "evaluation": ", ".join(TASKS[task].dev_splits)}
    assert results["actions"] == {"trained": True, "measured": True, "predicted": True}
    assert results["predictions"] == [f"predictions/{file}" for file in FILES[task]]
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == sorted(FILES[task])
    written = [(tmp_path / "predictions" / file).read_text() for file in FILES[task]]
    for split, content in zip(TASKS[task].test_splits, written, strict=True):
        same_predictions(content, server_file(tmp_path, task, split))
    answers = {line.split("\t")[1] for content in written for line in content.splitlines()[1:]}
    assert len(answers) > 1, "an order cannot be told from one answer"


def test_scores_of_stsb_are_measured_as_scores(glue, checkpoint, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, flags(checkpoint, "stsb", glue, tmp_path))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.config.num_labels == 1
    tokenizer, rows = AutoTokenizer.from_pretrained(tmp_path), load_glue("stsb", glue)["validation"]
    with torch.no_grad():
        inputs = tokenizer(rows["sentence1"][:], rows["sentence2"][:], truncation=True, max_length=80, padding=True)
        answers = model(**inputs.convert_to_tensors("pt")).logits[:, 0].numpy()
    expected = np.corrcoef(answers, rows["label"][:])[0, 1]
    # Both correlations are of float32 answers, whose padding may differ.
    assert results["stages"][0]["metrics"]["pearson"] == pytest.approx(expected, abs=1e-4)


def test_test_rows_that_are_missing_or_moved_are_refused(glue, tmp_path) -> None:
    """The server goes by their number, and a file's own numbers would be lost."""
    shutil.copytree(glue / "CoLA", tmp_path / "CoLA")
    lines = (tmp_path / "CoLA/test.tsv").read_text(encoding="utf-8").split("\n")  # texts hold other ends of line
    (tmp_path / "CoLA/test.tsv").write_text("\n".join([*lines[:4], *lines[5:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 3 \(from 0\) has the index 4, but the GLUE server"):
        load_test("cola", tmp_path)
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "idx": [0, 2, 1]})
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "saved/cola"))
    with pytest.raises(ValueError, match=r"row 1 \(from 0\) has the index 2"):
        load_test("cola", tmp_path / "saved")


def test_weights_are_trained_in_32_bits_however_they_are_stored(glue, checkpoint, tmp_path, monkeypatch) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    run(finetune_glue, monkeypatch, flags(tmp_path / "model", "cola", glue, tmp_path / "out"))
    trained = hf_attnkit.load_pretrained(tmp_path / "out")
    assert trained.dtype == torch.float32
    # Adam moves each weight by about the learning rate, 1e-5, of which 16 bits of a weight of 0.02 know nothing.
    before, after = (m.bert.encoder.layer[0].attention.self.query.weight for m in (model, trained))
    assert (before.float() != after).float().mean() > 0.9
    run(finetune_glue, monkeypatch, flags(tmp_path / "model", "cola", glue, tmp_path / "as", "--dtype", "auto"))
    assert hf_attnkit.load_pretrained(tmp_path / "as").dtype == torch.bfloat16


def test_what_was_measured_on_a_part_says_so(glue, checkpoint, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, flags(checkpoint, "cola", glue, tmp_path, "--max_eval_samples", "4"))
    assert results["data"]["note"] == "a part of the dev set, the first 4 of 12"
    assert results["data"]["evaluation_examples"] == 4
    assert results["data"]["note"] in (tmp_path / "README.md").read_text()


def test_smoothed_labels_are_refused_for_scores(glue, checkpoint, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"--label_smoothing_factor 0\.1 has no meaning for the scores of 'stsb'"):
        run(finetune_glue, monkeypatch, flags(checkpoint, "stsb", glue, tmp_path, "--label_smoothing_factor", "0.1"))


@pytest.mark.parametrize("path", ["/no/model", "./model", "outputs/glue/cola"])
def test_a_model_that_is_nowhere_is_named(path, glue, tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=f"--model_name_or_path {path} is no folder"):
        run(finetune_glue, monkeypatch, flags(path, "cola", glue, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("first", "then"), [("mnli", "rte"), ("cola", "stsb"), ("stsb", "cola")])
def test_a_task_starts_from_a_model_of_another(first, then, glue, checkpoint, tmp_path, monkeypatch) -> None:
    """The body stays, the head begins anew, and the loss is the new task's."""
    rate = ("--learning_rate", "1e-3")
    run(finetune_glue, monkeypatch, [*flags(checkpoint, first, glue, tmp_path / "first"), *rate])
    arguments = [*flags(tmp_path / "first", then, glue, tmp_path / "then"), *rate]
    with pytest.raises(ValueError, match="classifier, pass ignore_mismatched_sizes"):
        run(finetune_glue, monkeypatch, arguments)
    results = run(finetune_glue, monkeypatch, [*arguments, "--ignore_mismatched_sizes"])
    assert results["stages"][0]["training_loss"] > 0.1  # of a single class it would be 0
    model = hf_attnkit.load_pretrained(tmp_path / "then")
    assert model.config.num_labels == TASKS[then].num_labels
    assert (model.config.problem_type == "regression") == TASKS[then].is_regression


def test_a_checkpoint_that_numbers_its_classes_otherwise_predicts_the_same_classes(
    glue, checkpoint, tmp_path, monkeypatch
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    for name in ("plain-model", "model"):
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "plain-model")
    model.config.id2label = {0: "Acceptable", 1: "Unacceptable"}  # GLUE's other way round, and in capitals
    model.config.label2id = {"Acceptable": 0, "Unacceptable": 1}
    model.save_pretrained(tmp_path / "model")
    only = ("--predict", "--do_train", "false", "--do_eval", "false")
    results = run(finetune_glue, monkeypatch, flags(tmp_path / "model", "cola", glue, tmp_path / "other", *only))
    run(finetune_glue, monkeypatch, flags(tmp_path / "plain-model", "cola", glue, tmp_path / "plain", *only))
    other, plain = (
        [line.split("\t")[1] for line in (tmp_path / name / "predictions/CoLA.tsv").read_text().splitlines()[1:]]
        for name in ("other", "plain")
    )
    assert results["stages"] == []
    assert other == [{"0": "1", "1": "0"}[answer] for answer in plain]


@pytest.mark.parametrize(
    ("task", "answers", "written"),
    [
        ("cola", [0, 1], "01"),
        ("qqp", [1, 0], "10"),
        ("wnli", [1, 0], "10"),
        ("rte", [0, 1], ["entailment", "not_entailment"]),
        ("mnli", [2, 0, 1], ["contradiction", "entailment", "neutral"]),
        ("ax", [1], ["neutral"]),
        ("stsb", [-0.25, 2.71828, 5.5], ["0.000", "2.718", "5.000"]),
    ],
)
def test_answers_are_written_as_the_server_takes_them(task, answers, written, tmp_path) -> None:
    write_predictions(tmp_path / "predictions" / "x.tsv", TASKS[task], np.array(answers))
    lines = [f"{i}\t{answer}\n" for i, answer in enumerate(written)]
    assert (tmp_path / "predictions" / "x.tsv").read_text() == "index\tprediction\n" + "".join(lines)
    assert len(list((tmp_path / "predictions").iterdir())) == 1


def test_every_recipe_that_trains_predicts_with_its_final_model(glue, checkpoint, tmp_path, monkeypatch) -> None:
    more = ("--predict", "--num_key_value_heads", "1")
    results = run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, "qnli", glue, tmp_path, *more))
    assert results["predictions"] == ["predictions/QNLI.tsv"]
    same_predictions((tmp_path / "predictions/QNLI.tsv").read_text(), server_file(tmp_path, "qnli", "test"))


@pytest.mark.parametrize(
    "place", ["diagnostic/diagnostic.tsv", "AX/diagnostic.tsv", "AX/AX.tsv", "AX.tsv", "diagnostic.tsv"]
)
def test_the_diagnostic_set_is_found_where_downloads_leave_it(place, tmp_path) -> None:
    expected = write_test(tmp_path, "ax")["test"]
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / "diagnostic.tsv").rename(tmp_path / place)
    tests = load_test("ax", tmp_path)
    assert list(tests) == ["AX.tsv"] and tests["AX.tsv"].to_dict() == expected


def test_mnli_predicts_the_diagnostic_set_and_a_model_of_mnli_does_alone(
    glue, checkpoint, tmp_path, monkeypatch
) -> None:
    data = tmp_path / "data"
    write_glue(data, "mnli")
    write_test(data / "diagnostic", "ax", 9)
    results = run(finetune_glue, monkeypatch, flags(checkpoint, "mnli", data, tmp_path / "mnli", "--predict"))
    assert results["predictions"] == [f"predictions/{file}" for file in (*FILES["mnli"], "AX.tsv")]
    written = (tmp_path / "mnli/predictions/AX.tsv").read_text()
    assert written == server_file(tmp_path / "mnli", "ax", "test", 9)
    alone = run(finetune_glue, monkeypatch, flags(tmp_path / "mnli", "ax", data, tmp_path / "ax", "--predict"))
    assert alone["stages"] == [] and alone["train_samples"] == 0 and alone["change"] is None
    assert alone["actions"] == {"trained": False, "measured": False, "predicted": True}
    assert alone["data"]["splits"] == {"train": None, "evaluation": None} and alone["data"]["name"] == "AX"
    assert (tmp_path / "ax/predictions/AX.tsv").read_text() == written


def test_mnli_without_the_diagnostic_set_says_so(tmp_path) -> None:
    write_glue(tmp_path, "mnli")
    with pytest.warns(UserWarning, match=r"AX.tsv is not written.*diagnostic/diagnostic.tsv"):
        assert list(load_test("mnli", tmp_path)) == FILES["mnli"]


@pytest.mark.parametrize(
    ("module", "more", "message"),
    [
        (finetune_glue, ("--predict", "--do_train"), "nothing to train on"),
        (finetune_glue, (), "give --predict alone"),
        (compare_conversions_glue, ("--predict", "--num_key_value_heads", "1"), "this one does not"),
    ],
)
def test_commands_that_have_nothing_to_do_on_the_diagnostic_set(
    module, more, message, checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    with pytest.raises(SystemExit):
        run(module, monkeypatch, flags(checkpoint, "ax", tmp_path, tmp_path / "out", *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "more", "message"),
    [
        (finetune_glue, (), r"classes \['label_0', 'label_1'\].*model of mnli"),
        (uptrain_gqa_glue, ("--num_key_value_heads", "1"), "no training data"),
    ],
)
def test_the_diagnostic_set_is_for_models_of_mnli(module, more, message, checkpoint, tmp_path, monkeypatch) -> None:
    write_test(tmp_path / "AX", "ax")
    with pytest.raises(ValueError, match=message):
        run(module, monkeypatch, flags(checkpoint, "ax", tmp_path, tmp_path / "out", "--predict", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "message"), [("demo", "no test split"), ("rte", r"needs test\.tsv"), ("mnli", r"needs test_matched\.tsv")]
)
def test_a_task_without_test_rows_is_refused_before_training(task, message, checkpoint, tmp_path, monkeypatch) -> None:
    data = None
    if task != "demo":
        data = tmp_path / "data"
        write_task(data / TASKS[task].folder, task)
    monkeypatch.setattr(GlueRun, "train", never(GlueRun.train, "trained before"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(finetune_glue, monkeypatch, flags(checkpoint, task, data, tmp_path / "out", "--predict"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "needed"),
    [(compare_conversions_glue, ("--num_key_value_heads", "1")), (compare_pruning_glue, ("--prune_fractions", "0.5"))],
)
def test_a_recipe_that_saves_no_model_predicts_nothing(
    module, needed, glue, checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    with pytest.raises(SystemExit):
        run(module, monkeypatch, flags(checkpoint, "cola", glue, tmp_path / "out", "--predict", *needed))
    assert "--predict is for recipes that save a model" in capsys.readouterr().err


def test_do_predict_points_to_predict(glue, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(finetune_glue, monkeypatch, flags(checkpoint, "cola", glue, tmp_path / "out", "--do_predict"))
    assert "those for GLUE have --predict" in capsys.readouterr().err
