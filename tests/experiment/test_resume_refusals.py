"""What is not resumed: another run, half-written checkpoints, another model's; and what a full disk leaves."""

# ruff: noqa: F811

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import finetune_glue
import pytest
import uptrain_gqa_glue
from support.fakes import never
from support.kills import (  # noqa: F401  # fixtures among them
    CONVERTED,
    EACH_STEP,
    Killed,
    assert_same,
    checkpoint,
    dies,
    interrupted,
    whole,
)
from support.recipe_runs import flags, run
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (uptrain_gqa_glue, (*CONVERTED,), r"did not end.*resume it with --resume_from_checkpoint"),
        (
            uptrain_gqa_glue,
            (*CONVERTED, "--resume_from_checkpoint", "--learning_rate", "1e-3", "--method", "mean"),
            r"holds another run: learning_rate was 0.01 and is 0.001; method was None and is 'mean'",
        ),
        (finetune_glue, ("--resume_from_checkpoint",), r"recipe was 'uptrain_gqa_glue' and is 'finetune_glue'"),
        (
            uptrain_gqa_glue,
            (*CONVERTED, "--resume_from_checkpoint", "--do_eval"),
            "resume_from_checkpoint true has no effect without training",
        ),
    ],
)
def test_a_folder_that_holds_another_run_is_refused_and_stays(
    recipe, more, message, checkpoint, interrupted, monkeypatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    with pytest.raises(ValueError, match=message):
        run(recipe, monkeypatch, flags(checkpoint, interrupted, *EACH_STEP, *more))
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")} == before


def test_another_model_is_another_run_and_another_way_of_writing_it_is_not(
    checkpoint, interrupted, tmp_path, monkeypatch
) -> None:
    shutil.copytree(interrupted, tmp_path / "out")
    shutil.copytree(checkpoint, tmp_path / "model")
    arguments = [*EACH_STEP, *CONVERTED, "--resume_from_checkpoint"]
    with pytest.raises(ValueError, match=r"model_name_or_path was .*model' and is .*model'"):
        run(uptrain_gqa_glue, monkeypatch, flags(tmp_path / "model", tmp_path / "out", *arguments))
    monkeypatch.chdir(checkpoint.parent)
    arguments += ["--logging_steps", "1", "--per_device_eval_batch_size", "4"]
    assert run(uptrain_gqa_glue, monkeypatch, flags(Path("model"), tmp_path / "out", *arguments))["stages"]


def test_checkpoints_of_another_program_are_refused(checkpoint, tmp_path, monkeypatch) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    for more in ((), ("--resume_from_checkpoint",)):
        with pytest.raises(ValueError, match=r"checkpoint-3 of another program"):
            run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, *more))
    with pytest.raises(ValueError, match=r"checkpoint-3 is not a whole checkpoint"):
        named = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
        run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, *named))


def test_checkpoints_without_an_optimizer_are_not_gone_on_from(checkpoint, whole, tmp_path, monkeypatch) -> None:
    """Trainer would begin a new optimizer without a word."""
    arguments = flags(checkpoint, tmp_path / "out", *EACH_STEP, *CONVERTED)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dies(patched, Trainer, "training_step", 4)
        run(uptrain_gqa_glue, monkeypatch, [*arguments, "--save_only_model"])
    left = str(tmp_path / "out" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3 holds no state of the optimizer, as --save_only_model"):
        run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint", left])
    results = run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert "resumed_from" not in results["stages"][-1]
    assert_same(tmp_path / "out", whole)


def other_model(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    if kind == "shapes":
        return BertForSequenceClassification(BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        ))  # fmt: skip
    return DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64,
    ))  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("shapes", "BertFor"), ("family", "DistilBertFor")])
@pytest.mark.parametrize("lora", [(), ("--lora",)])
def test_a_checkpoint_of_another_model_is_refused_before_training(
    kind, name, lora, checkpoint, tokenizer, tmp_path, monkeypatch
) -> None:  # fmt: skip
    other_model(kind, tokenizer).save_pretrained(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-9" / "optimizer.pt").touch()
    monkeypatch.setattr(Trainer, "train", never(Trainer.train, "trained"))
    named = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-9"), *lora)
    here = "PeftModel" if lora else "BertForSequenceClassification"
    with pytest.raises(ValueError, match=rf"another model \({name}SequenceClassification, not {here}.*has the shape"):
        run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *named))


# A full disk: no file may grow beyond a limit, which the system enforces as it does a disk's end.


@pytest.mark.parametrize(
    ("share", "steps"),
    # The weights fit, and the optimizer's two moments of each weight do not; or not even the converted weights fit.
    [(1.5, 2), (0.5, 0)],
)
def test_a_full_disk_is_said_and_costs_nothing_that_was_written(
    share, steps, checkpoint, whole, tmp_path, monkeypatch
) -> None:
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED)
    if steps:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            dies(patched, Trainer, "training_step", steps + 1)
            run(uptrain_gqa_glue, monkeypatch, arguments)
        arguments = [*arguments, "--resume_from_checkpoint"]
    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), (checkpoint / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written to the end.*free some space and resume with"):
            run(uptrain_gqa_glue, monkeypatch, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = json.loads((tmp_path / "progress.json").read_text())
    assert (done["checkpoints"], len(done["changes"])) == (([1, 2], 1) if steps else ([], 0))
    run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert_same(tmp_path, whole)
