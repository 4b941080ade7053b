"""Runs of several trainings resume in theirs: rounds of pruning, comparisons, and the control."""

# ruff: noqa: F811

from __future__ import annotations

from pathlib import Path

import prune_heads_glue
import pytest
import uptrain_gqa_glue
from compare import pruning_glue as compare_pruning_glue
from support.kills import (  # noqa: F401  # fixtures among them
    CONVERTED,
    EACH_STEP,
    Killed,
    assert_same,
    checkpoint,
    dies,
    killed,
    outcome,
    second,
    whole,
)
from support.recipe_runs import flags, run
from transformers import (
    Trainer,
)

import hf_attnkit

ROUNDS = ("--prune_fraction", "0.5", "--prune_steps", "2", "--score_samples", "32", "--refit_samples", "32")
ROUNDS += ("--distill", "--lora", "--lora_r", "4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole_rounds(checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("rounds") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(prune_heads_glue, monkeypatch, flags(checkpoint, output, *EACH_STEP, *ROUNDS))
    return output


@pytest.mark.parametrize(
    "moment",
    [
        (Trainer, "training_step", 4, None),  # in the first round
        (Trainer, "evaluate", 4, None),  # with the second round's heads gone
        (Trainer, "training_step", 9, None),  # with checkpoints of the first round alone
        (Trainer, "training_step", 12, None),
    ],
    ids=["first training", "second pruning", "second training", "its checkpoints"],
)
def test_pruning_in_rounds_goes_on_in_its_round(moment, checkpoint, whole_rounds, tmp_path, monkeypatch) -> None:
    owner, name, number, half = moment
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *ROUNDS)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dies(patched, owner, name, number, half=half)
        run(prune_heads_glue, monkeypatch, arguments)
    run(prune_heads_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert_same(tmp_path, whole_rounds)
    scores = [(folder / "head_importance.json").read_text() for folder in (tmp_path, whole_rounds)]
    assert scores[0] == scores[1]


def test_a_comparison_goes_on_in_its_training(checkpoint, tmp_path, monkeypatch) -> None:
    """Each training of a comparison starts from the untouched model, none from another's checkpoint."""
    options = ("--prune_fractions", "0.5", "--variants", "random", "entropy", "--refits", "none")
    options += ("--score_samples", "16")
    arguments = flags(checkpoint, tmp_path / "killed", *EACH_STEP, *options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dies(patched, Trainer, "training_step", 19)  # the third training's
        run(compare_pruning_glue, monkeypatch, arguments)
    results = run(compare_pruning_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert [stage.get("resumed_from") for stage in results["stages"]][-1] == "checkpoint-2"
    whole = run(compare_pruning_glue, monkeypatch, flags(checkpoint, tmp_path / "whole", *EACH_STEP, *options))
    assert outcome(results) == outcome(whole)


WITH_CONTROL = (*EACH_STEP, "--save_steps", "2", *CONVERTED, "--control", "--lora", "--lora_r", "4")


@pytest.fixture(scope="module")
def whole_with_control(checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("control") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *WITH_CONTROL))
    return output


@pytest.mark.parametrize(
    "moment",
    [
        (Trainer, "training_step", 5, None),  # in the control's training
        (Trainer, "evaluate", 2, None),  # in the control's evaluation
        (hf_attnkit, "convert_to_gqa", 1, None),
        (Trainer, "training_step", 12, None),  # in the converted model's
    ],
    ids=["control", "its evaluation", "conversion", "recovery"],
)
def test_a_run_with_a_control_resumes_in_either_training(
    moment, checkpoint, whole_with_control, tmp_path, monkeypatch
) -> None:
    killed = flags(checkpoint, tmp_path, *WITH_CONTROL)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dies(patched, *moment[:3])
        run(uptrain_gqa_glue, monkeypatch, killed)
    results = run(uptrain_gqa_glue, monkeypatch, [*killed, "--resume_from_checkpoint"])
    assert [stage["stage"] for stage in results["stages"]] == ["baseline", "control", "changed", "recovered"]
    assert_same(tmp_path, whole_with_control)
