"""Several tasks and seeds in one command: what is run, taken over, refused, and the means and deviations."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

import finetune_glue
import pytest
import uptrain_gqa_glue
from support.fakes import never
from support.glue_files import tiny_checkpoint, write_glue
from support.subprocesses import launched, run_script
from support.task_runs import flags, same_predictions, server_file
from transformers import Trainer, TrainingArguments

from hf_attnkit.experiment import sweep
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.glue.tasks import task_names
from hf_attnkit.experiment.record import command_digest
from hf_attnkit.experiment.report.stage_table import label
from hf_attnkit.experiment.sweep import OneRun, summarize

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), "cola", "mrpc")


def run(module, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()
    return read(Path(arguments[arguments.index("--output_dir") + 1]))


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# Names.


def test_names_of_tasks() -> None:
    assert task_names("all") == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    assert task_names("rte,cola") == ["rte", "cola"]
    assert task_names("ax") == ["ax"] and task_names("demo") == ["demo"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cola,colla", "'colla'"),
        ("cola,", "Unknown task ''"),
        ("cola,rte,cola", "names cola twice"),
        ("cola,demo", "demo is no part of GLUE's average; run it alone\\."),
        ("mnli,ax", "ax is no part.*mnli writes AX.tsv"),
    ],
)
def test_names_that_cannot_be(name, message) -> None:
    with pytest.raises(ValueError, match=message):
        GlueArguments("model", name)


@pytest.mark.parametrize(
    ("seeds", "message"), [([1, 1], "1 twice"), ([0, -1], "--seeds -1 must"), ([2**32], "--seeds 4294967296")]
)
def test_seeds_that_cannot_be(seeds, message) -> None:
    with pytest.raises(ValueError, match=message):
        GlueArguments("model", "cola", seeds=seeds)


# Arithmetic.


def finished(folder: Path, task: str, seed: int, *stages: dict) -> OneRun:
    place = folder / task / f"seed-{seed}"
    names = ("baseline", "changed")
    rows = [
        {"stage": name, "metrics": metrics, "parameters": 7, "work_seconds": 10.0 + seed}
        for name, metrics in zip(names, stages, strict=False)
    ]
    write_json(place / "results.json", {"stages": rows})
    return OneRun(task, seed, "model", place, [])


def test_means_deviations_and_glues_average_by_hand(tmp_path) -> None:
    planned = [
        finished(tmp_path, "cola", 0, {"matthews_correlation": 0.5, "accuracy": 0.9}),
        finished(tmp_path, "cola", 1, {"matthews_correlation": 0.7, "accuracy": 0.9}),
        finished(tmp_path, "mrpc", 0, {"accuracy": 0.8, "f1": 0.9}),
        finished(tmp_path, "mrpc", 1, {"accuracy": 0.6, "f1": 0.7}),
        finished(tmp_path, "stsb", 0, {"pearson": 0.9, "spearmanr": 0.8}),
        finished(tmp_path, "stsb", 1, {"pearson": 0.9, "spearmanr": 0.8}),
        finished(tmp_path, "mnli", 0, {"accuracy_matched": 0.8, "accuracy_mismatched": 0.7}),
        finished(tmp_path, "mnli", 1, {"accuracy_matched": 0.8, "accuracy_mismatched": 0.7}),
        finished(tmp_path, "wnli", 0, {"accuracy": 0.5}),
        finished(tmp_path, "wnli", 1, {"accuracy": 0.5}),
    ]
    results = summarize(planned, tmp_path)
    assert results["tasks"] == ["cola", "mrpc", "stsb", "mnli", "wnli"] and results["seeds"] == [0, 1]
    cola, mrpc, *_ = results["stages"]
    # Of two values the sample's deviation is their distance over the square root of 2.
    assert cola["metrics"]["matthews_correlation"] == pytest.approx({"mean": 0.6, "std": 0.2 / 2**0.5})
    assert cola["metrics"]["accuracy"] == {"mean": 0.9, "std": 0.0}
    assert mrpc["metrics"]["f1"] == pytest.approx({"mean": 0.8, "std": 0.2 / 2**0.5})
    assert (cola["task"], cola["stage"], cola["parameters"]) == ("cola", "baseline", 7)
    assert cola["work_seconds"] == pytest.approx({"mean": 10.5, "std": 0.5**0.5})
    # Scores of seed 0: 0.5, 0.85, 0.85, 0.75, 0.5; of seed 1: 0.7, 0.65, 0.85, 0.75, 0.5.
    (average,) = results["averages"]
    assert average["stage"] == "baseline"
    assert average["metrics"]["average"] == pytest.approx({"mean": 0.69, "std": 0.0}, abs=1e-12)
    assert average["metrics"]["average without wnli"] == pytest.approx({"mean": 0.7375, "std": 0.0}, abs=1e-12)
    assert results["runs"][:2] == ["cola/seed-0", "cola/seed-1"]


def test_one_seed_has_no_deviation_and_one_task_no_average(tmp_path, capsys) -> None:
    metrics = [{"matthews_correlation": 0.5, "accuracy": 0.9}, {"matthews_correlation": 0.25, "accuracy": 0.8}]
    results = summarize([finished(tmp_path, "cola", 3, *metrics)], tmp_path)
    assert [stage["metrics"]["accuracy"] for stage in results["stages"]] == [
        {"mean": 0.9, "std": None},
        {"mean": 0.8, "std": None},
    ]
    assert results["averages"] == []
    sweep.print_summary(results)
    printed = capsys.readouterr().out
    assert "0.2500" in printed and "changed" in printed and "average" not in printed


def test_costs_that_not_all_runs_tell_are_left_out(tmp_path) -> None:
    planned = [finished(tmp_path, "cola", seed, {"matthews_correlation": 0.5, "accuracy": 0.9}) for seed in (0, 1)]
    file = planned[1].folder / "results.json"
    file.write_text(file.read_text().replace("work_seconds", "of an earlier version"))
    (stage,) = summarize(planned, tmp_path)["stages"]
    assert "work_seconds" not in stage and stage["metrics"]["accuracy"] == {"mean": 0.9, "std": 0.0}


def test_scores_that_are_no_number_have_no_deviation(tmp_path) -> None:
    """Spearman's correlation of equal answers; `statistics` raises an AttributeError of its own."""
    planned = [finished(tmp_path, "stsb", seed, {"pearson": 0.5, "spearmanr": math.nan}) for seed in (0, 1)]
    (stage,) = summarize(planned, tmp_path)["stages"]
    assert stage["metrics"]["pearson"] == {"mean": 0.5, "std": 0.0}
    assert math.isnan(stage["metrics"]["spearmanr"]["mean"]) and stage["metrics"]["spearmanr"]["std"] is None


def test_stages_that_are_compared_are_told_apart() -> None:
    assert label({"stage": "changed", "metrics": {}}) == "changed"
    assert label({"stage": "changed", "round": 2}) == "changed, round 2"
    compared = {"stage": "recovered", "variant": "entropy", "prune_fraction": 0.5, "refit": "none"}
    assert label(compared) == "recovered, entropy, refit none, prune_fraction 0.5"


def test_a_recipe_that_makes_one_run_refuses_seeds(tmp_path) -> None:
    training = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="--seeds has no effect"):
        GlueRun(GlueArguments("model", "cola", seeds=[0, 1]), training)


# Runs.


def test_tasks_and_seeds_then_a_recipe_that_starts_from_each(glue, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    first = tmp_path / "first"
    results = run(finetune_glue, monkeypatch, flags(checkpoint, "cola,mrpc", glue, first, "--seeds", "3", "1"))
    assert results["runs"] == ["cola/seed-3", "cola/seed-1", "mrpc/seed-3", "mrpc/seed-1"]
    runs = {name: read(first / name) for name in results["runs"]}
    assert [one["seed"] for one in runs.values()] == [3, 1, 3, 1]
    accuracies = [runs[f"mrpc/seed-{seed}"]["stages"][0]["metrics"]["accuracy"] for seed in (3, 1)]
    (row,) = (stage for stage in results["stages"] if stage["task"] == "mrpc")
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert "average" in capsys.readouterr().out

    # Each run's own command repeats it alone, from where its folders are.
    alone = shlex.split(runs["mrpc/seed-1"]["command"])
    assert alone[:2] == ["python", "finetune_glue.py"] and "--seeds" not in alone
    places = {"--output_dir": tmp_path / "alone", "--model_name_or_path": checkpoint, "--data_dir": glue}
    for flag, place in places.items():
        at = alone.index(flag) + 1
        assert alone[at] == (first / "mrpc/seed-1" if flag == "--output_dir" else place).name
        alone[at] = str(place)
    again = run(finetune_glue, monkeypatch, alone[2:])
    assert again["stages"][0]["metrics"] == runs["mrpc/seed-1"]["stages"][0]["metrics"]

    models = first / "{task}" / "seed-{seed}"
    more = ("--seeds", "1", "--num_key_value_heads", "2", "--do_eval")
    run(uptrain_gqa_glue, monkeypatch, flags(models, "cola,mrpc", glue, tmp_path / "second", *more))
    for task in ("cola", "mrpc"):
        converted = read(tmp_path / "second" / task / "seed-1")
        assert converted["model"]["path"] == "local"
        assert converted["stages"][0]["metrics"] == runs[f"{task}/seed-1"]["stages"][0]["metrics"]


def test_a_killed_sweep_goes_on_and_a_larger_one_takes_over(glue, checkpoint, tmp_path, monkeypatch) -> None:
    done: list[tuple[str, int]] = []
    original = GlueRun.finish

    def finish(self: GlueRun, **facts) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        original(self, **facts)
        done.append((self.task_name, self.training.seed))

    arguments = flags(checkpoint, "cola", glue, tmp_path, "--do_eval", "--seeds", "0", "1")
    monkeypatch.setattr(GlueRun, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        run(finetune_glue, monkeypatch, arguments)
    assert done == [("cola", 0)] and not (tmp_path / "results.json").exists()
    before = (tmp_path / "cola/seed-0/results.json").stat().st_mtime_ns
    done = []
    monkeypatch.setattr(GlueRun, "finish", lambda self, **facts: (original(self, **facts), done.append(self.output)))
    results = run(finetune_glue, monkeypatch, arguments)
    assert done == [tmp_path / "cola/seed-1"] and results["runs"] == ["cola/seed-0", "cola/seed-1"]
    assert (tmp_path / "cola/seed-0/results.json").stat().st_mtime_ns == before

    with pytest.raises(ValueError, match="finished run"):
        run(finetune_glue, monkeypatch, arguments)
    more = flags(checkpoint, "cola", glue, tmp_path, "--do_eval", "--seeds", "0", "1", "2")
    assert run(finetune_glue, monkeypatch, more)["seeds"] == [0, 1, 2]
    assert done == [tmp_path / "cola/seed-1", tmp_path / "cola/seed-2"]

    (tmp_path / "results.json").unlink()
    other = flags(checkpoint, "cola", glue, tmp_path, "--do_eval", "--seeds", "0", "--max_eval_samples", "4")
    with pytest.raises(ValueError, match=r"seed-0/results\.json is of another command.*--output_dir"):
        run(finetune_glue, monkeypatch, other)


def test_a_sweep_killed_while_training_goes_on_with_the_same_command(glue, checkpoint, tmp_path, monkeypatch) -> None:
    arguments = flags(checkpoint, "cola", glue, tmp_path, "--seeds", "0", "1")
    arguments[arguments.index("--save_strategy") + 1] = "steps"
    train, steps = Trainer.training_step, []

    def dies(self: Trainer, *given, **options):
        steps.append(1)
        if len(steps) == 5:  # three a run
            raise KeyboardInterrupt
        return train(self, *given, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "training_step", dies)
        run(finetune_glue, monkeypatch, [*arguments, "--save_steps", "1"])
    assert (tmp_path / "cola/seed-1/progress.json").exists()
    results = run(finetune_glue, monkeypatch, [*arguments, "--save_steps", "1"])
    second = json.loads((tmp_path / "cola/seed-1/results.json").read_text())
    assert second["stages"][0]["resumed_from"].endswith("checkpoint-1") and results["seeds"] == [0, 1]


def test_a_resumed_sweep_resumes_only_what_was_begun(glue, checkpoint, tmp_path, monkeypatch) -> None:
    resume = ("--seeds", "0", "1", "--resume_from_checkpoint", "true")
    (tmp_path / "cola" / "seed-1" / "checkpoint-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["finetune_glue.py", *flags(checkpoint, "cola", glue, tmp_path, *resume)])
    called: list[tuple] = []
    sweep.run_each(lambda *parsed: called.append(parsed) or note(parsed), GlueArguments)
    first, second = (parsed[-1] for parsed in called)
    assert (first.resume_from_checkpoint, second.resume_from_checkpoint) == (None, "true")


def note(parsed: tuple) -> bool:
    """Leave the results of a run that measured nothing."""
    results = {"stages": [], "command_digest": command_digest(parsed[0].command)}
    write_json(Path(parsed[-1].output_dir) / "results.json", results)
    return True


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("cola", ("--seeds", "0", "1", "--seed", "3"), "--seed 3 has no effect with --seeds"),
        ("cola,mrpc", ("--push_to_hub",), "--push_to_hub pushes one model"),
        ("cola,rte", (), "RTE"),
        ("cola,mrpc", ("--predict",), r"needs test\.tsv"),
        ("cola,mrpc", ("--model_name_or_path", "TMP/{task}"), "mrpc"),
        ("cola", ("--seeds", "0", "1", "--resume_from_checkpoint", "TMP"), "the checkpoint of one run"),
    ],
)
def test_bad_input_of_a_later_run_is_named_before_the_first(
    task, more, message, glue, checkpoint, tmp_path, monkeypatch
) -> None:
    data = glue
    if "--predict" in more:
        data = write_glue(tmp_path / "data", "cola", "mrpc")
        (data / "MRPC" / "test.tsv").unlink()
    (tmp_path / "cola").symlink_to(checkpoint)
    more = tuple(word.replace("TMP", str(tmp_path)) for word in more)
    monkeypatch.setattr(finetune_glue, "finetune", never(finetune_glue.finetune, "ran before"))
    with pytest.raises((ValueError, OSError), match=message):
        run(finetune_glue, monkeypatch, flags(checkpoint, task, data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_two_processes_loop_alike_and_keep_the_order_of_predictions(glue, checkpoint, tmp_path) -> None:
    more = ("--seeds", "0", "1", "--predict", "--train_sampling_strategy", "group_by_length")
    arguments = flags(checkpoint, "cola,mrpc", glue, tmp_path, *more)
    two = launched(2, run_script, str(RECIPES / "finetune_glue.py"), arguments)
    assert not any(done.returncode for done in two), two[0].stderr[-3000:] + two[1].stderr[-3000:]
    results = read(tmp_path)
    assert results["runs"] == ["cola/seed-0", "cola/seed-1", "mrpc/seed-0", "mrpc/seed-1"]
    assert (two[0].stdout + two[1].stdout).count("sample standard deviation") == 1
    for name in results["runs"]:
        task = name.split("/")[0]
        (file,) = (tmp_path / name / "predictions").iterdir()
        same_predictions(file.read_text(), server_file(tmp_path / name, task, "test"))
