"""The recipes end to end on a tiny model: stages, files, reloading; and nothing written after bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import finetune_glue
import pytest
import torch
import uptrain_gqa_glue
from compare import conversions_glue as compare_conversions_glue
from support.recipe_runs import flags, run
from transformers import (
    TrainingArguments,
)

import hf_attnkit
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.comparing.conversions import VARIANTS, ComparisonArguments
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.glue.demo_data import make_demo_data
from hf_attnkit.experiment.glue.metric import GlueMetric
from hf_attnkit.experiment.glue.run import GlueArguments

RECIPES = Path(__file__).parents[2] / "recipes"


def test_finetune_reports_one_stage_and_changes_the_weights(checkpoint, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "out"))
    (stage,) = results["stages"]
    assert stage["stage"] == "fine-tuned"
    assert set(stage["metrics"]) == {"matthews_correlation", "accuracy"}
    assert stage["num_heads"] == stage["num_key_value_heads"] == [4, 4]
    assert results["task"] == "demo"
    assert (results["data"]["hub_path"], results["data"]["is_benchmark"]) == ("demo", False)
    assert results["change"] == {"kind": "fine-tuning", "title": "fine-tuned", "facts": {}}
    assert results["actions"] == {"trained": True, "measured": True, "predicted": False}
    assert results["timing"] is None and results["control"] is None
    before, after = hf_attnkit.load_pretrained(checkpoint), hf_attnkit.load_pretrained(tmp_path / "out")
    assert not torch.equal(before.score.weight if hasattr(before, "score") else before.classifier.weight,
                           after.score.weight if hasattr(after, "score") else after.classifier.weight)  # fmt: skip


def test_uptrain_converts_and_the_saved_model_scores_what_was_reported(
    checkpoint, tokenizer, tmp_path, monkeypatch
) -> None:
    results = run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "out", "--num_key_value_heads", "2"))
    stages = {stage["stage"]: stage for stage in results["stages"]}
    assert list(stages) == ["baseline", "changed", "recovered"]
    assert stages["baseline"]["num_key_value_heads"] == [4, 4]
    assert stages["changed"]["num_key_value_heads"] == stages["recovered"]["num_key_value_heads"] == [2, 2]
    assert stages["changed"]["parameters"] < stages["baseline"]["parameters"]

    model = hf_attnkit.load_pretrained(tmp_path / "out")
    rows = make_demo_data()["validation"].select(range(40))
    with torch.no_grad():
        inputs = tokenizer(rows["sentence"][:], padding=True, return_tensors="pt")
        if "token_type_ids" in inputs and model.config.model_type == "llama":
            del inputs["token_type_ids"]
        answers = model(**inputs).logits.argmax(-1)
    measured = GlueMetric("demo").compute(predictions=answers, references=rows["label"][:])
    assert measured == pytest.approx(stages["recovered"]["metrics"])


@pytest.mark.parametrize(
    ("checkpoint", "more"),
    [
        ("bert", ("--distill",)),
        ("bert", ("--lora", "--lora_r", "4", "--distill")),
        ("llama", ("--lora", "--lora_r", "4")),
        ("llama", ("--lora", "--lora_r", "4", "--distill")),
    ],
    indirect=["checkpoint"],
)
def test_recovery_with_a_teacher_and_with_adapters_leaves_a_plain_checkpoint(
    more, checkpoint, tmp_path, monkeypatch
) -> None:
    options = ("--num_key_value_heads", "2", "--learning_rate", "1e-2", *more)
    results = run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *options))
    assert [stage["num_key_value_heads"] for stage in results["stages"]] == [[4, 4], [2, 2], [2, 2]]
    assert results.get("distill_weight") == (0.5 if "--distill" in more else None)
    assert results.get("lora_r") == (4 if "--lora" in more else None)
    assert not list((tmp_path / "out").glob("adapter*"))
    # Measured again from the saved checkpoint alone.
    again = run(finetune_glue, monkeypatch, flags(tmp_path / "out", tmp_path / "again", "--do_eval"))
    assert again["stages"][0]["metrics"] == pytest.approx(results["stages"][-1]["metrics"])


@pytest.mark.parametrize(
    ("given", "train", "evaluate"),
    [
        ((), True, True),
        (("--do_eval",), False, True),
        (("--do_train",), True, False),
        (("--do_train", "False"), False, True),
        # TrainingArguments turns do_eval on for an eval_strategy; training must not go missing for it.
        (("--eval_strategy", "epoch"), True, True),
        (("--do_train", "--do_eval"), True, True),
    ],
)
def test_what_is_done_follows_the_flags_given(given, train, evaluate, tmp_path) -> None:
    argv = ["--model_name_or_path", "m", "--task_name", "demo", "--output_dir", str(tmp_path), "--use_cpu", *given]
    _, training = parse_arguments(GlueArguments, argv=argv)
    assert isinstance(training, TrainingArguments)
    assert (training.do_train, training.do_eval) == (train, evaluate)


BAD = [
    (finetune_glue, ["--task_name", "colla"], "colla.*cola"),
    (finetune_glue, ["--task_name", "cola", "--data_dir", "/no/such/folder"], "/no/such/folder"),
    (finetune_glue, ["--max_train_samples", "0"], "max_train_samples 0"),
    (uptrain_gqa_glue, ["--num_key_value_heads", "3"], "num_key_value_heads=3"),
    (uptrain_gqa_glue, ["--distill"], "--distill has no effect without training"),
    (uptrain_gqa_glue, ["--distill_weight", "0.5"], "without --distill"),
    (uptrain_gqa_glue, ["--lora"], "--lora has no effect without training"),
    (uptrain_gqa_glue, ["--lora_alpha", "8"], "without --lora"),
    (uptrain_gqa_glue, ["--method", "random", "--grouping", "best"], "grouping='best'"),
    (finetune_glue, ["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint nowhere"),
]


@pytest.mark.parametrize(("module", "wrong", "message"), BAD)
def test_bad_input_is_named_and_leaves_nothing_that_looks_finished(
    module, wrong, message, checkpoint, tmp_path, monkeypatch
) -> None:
    output = tmp_path / "out"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(module, monkeypatch, flags(checkpoint, output, "--do_eval", *wrong))
    assert not output.exists() or not any(output.iterdir())


def test_unknown_method_is_refused_by_the_command_line(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "out", "--method", "median"))
    assert "median" in capsys.readouterr().err


def test_a_folder_with_a_finished_run_is_refused(checkpoint, tmp_path, monkeypatch) -> None:
    write_json(tmp_path / "results.json", {"old": True})
    with pytest.raises(ValueError, match="finished run"):
        run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == {"old": True}


def test_a_checkpoint_that_numbers_its_classes_otherwise_is_measured_right(
    checkpoint, tokenizer, tmp_path, monkeypatch
) -> None:
    first = run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "a"))
    model = hf_attnkit.load_pretrained(tmp_path / "a")
    head = model.score if hasattr(model, "score") else model.classifier
    with torch.no_grad():
        head.weight.copy_(head.weight.flip(0))
        if head.bias is not None:
            head.bias.copy_(head.bias.flip(0))
    model.config.id2label = {0: "acceptable", 1: "unacceptable"}
    model.config.label2id = {"acceptable": 0, "unacceptable": 1}
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    second = run(finetune_glue, monkeypatch, flags(tmp_path / "b", tmp_path / "c", "--do_eval"))
    assert second["stages"][0]["metrics"] == first["stages"][0]["metrics"]
    assert hf_attnkit.load_pretrained(tmp_path / "c").config.label2id["acceptable"] == 0


def test_conversions_compared(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Every variant is measured on the same model, which stays as it was, and calibration sees training data alone."""
    # All of them once, or a few for two numbers of heads.
    variants, numbers = list(VARIANTS), [1]
    if "llama" in checkpoint.parent.name:
        variants, numbers = ["mean", "pca+data", "pca+data+refit+best", "pca+data+refit"], [2, 1]
    output = tmp_path / "compared"
    command = ["x", "--model_name_or_path", str(checkpoint), "--task_name", "demo", "--output_dir", str(output)]
    command += ["--num_key_value_heads", *map(str, numbers), "--max_eval_samples", "40", "--calibration_samples", "80"]
    command += ["--max_length", "24", "--distance_samples", "20", "--variants", *variants]
    monkeypatch.setattr(sys, "argv", [*command, "--report_to", "none", "--use_cpu"])
    compare_conversions_glue.main()
    results = json.loads((output / "results.json").read_text())
    stages = results["stages"]
    assert [stage["stage"] for stage in stages] == ["baseline"] + ["changed"] * len(numbers) * len(variants)
    assert [stage.get("variant") for stage in stages[1:]] == variants * len(numbers)
    assert {tuple(stage["num_key_value_heads"]) for stage in stages} == {(4, 4), *((number,) * 2 for number in numbers)}
    assert results["calibration_samples"] == 80 and list(output.iterdir()) == [output / "results.json"]
    printed = capsys.readouterr().out
    assert all(f"4 -> {number}" in printed for number in numbers)
    assert "pca+data+refit+best" in printed and "distance to the untouched model" in printed
    distances = {stage["variant"]: stage["distance"] for stage in stages[-len(variants) :]}
    assert all(distance > 0 for distance in distances.values()) and distances["pca+data+refit"] < distances["mean"]


def test_a_budget_spent_over_the_layers_is_compared(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["x", "--model_name_or_path", str(checkpoint), "--task_name", "demo", "--output_dir", str(tmp_path)]
    command += ["--num_key_value_heads", "2", "--max_eval_samples", "8", "--calibration_samples", "16", "--max_length"]
    command += ["24", "--variants", "pca+data+spent", "--report_to", "none", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", command)
    compare_conversions_glue.main()
    _, stage = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert sum(stage["num_key_value_heads"]) <= 4 and "distance" not in stage
    command[command.index(str(tmp_path))] = str(tmp_path / "refused")
    monkeypatch.setattr(sys, "argv", [*command, "--distance_samples", "100000"])
    with pytest.raises(ValueError, match=r"--distance_samples 100000 must be from 0 to \d+: of \d+ training sentences"):
        compare_conversions_glue.main()


@pytest.mark.parametrize(
    "variant",
    [
        "pca+dat",
        "best",
        "mean+data",
        "pca+refit",
        "pca+data+output+refit",
        "pca+data+data",
        "",
        "mean+refit:ridge=x",
        "mean+refit:ridg=1",
        "mean+output:query_steps=2",
        "mean+refit+best:ridge=1",
        "mean+refit:token_weights=relative",
    ],
)
def test_unknown_variants_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match="--variants"):
        ComparisonArguments([1], [variant])
