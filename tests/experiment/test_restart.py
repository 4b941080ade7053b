"""A run killed at any moment goes on to what it would have been; what is half-written, or another run's, is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_glue
import prune_heads_glue
import pytest
import torch
import transformers
import uptrain_gqa_glue
from compare import pruning_glue as compare_pruning_glue
from support import text_runs
from support.recipe_runs import flags, run
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

import hf_attnkit
from hf_attnkit.experiment import resume as restart
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.glue.run import GlueArguments

# 64 sentences in batches of 16: two epochs of four steps, with dropout.
EACH_STEP = ("--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-2")
CONVERTED = ("--num_key_value_heads", "2", "--calibration_samples", "40")


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    folder = tmp_path_factory.mktemp("bert") / "model"
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Real kills: of a process, by itself, at a chosen moment.

KILLED = """
import os, runpy, signal, sys, torch, transformers
what, number, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def kill_at(owner, name, chosen, half):
    real, seen = getattr(owner, name), []
    def replaced(*arguments, **options):
        seen.append(chosen(*arguments))
        now = seen[-1] and sum(seen) == number
        result = None if now and not half else real(*arguments, **options)
        if now and half:
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, replaced)

if what == "step":
    kill_at(transformers.Trainer, "training_step", lambda *_: True, half=False)
if what == "file":  # the optimizer's of a checkpoint, half of it
    kill_at(torch, "save", lambda _, file, *__: str(file).endswith("optimizer.pt"), half=True)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def killed(what: str, number: int, recipe: Any, arguments: list[str]) -> None:
    """Run a recipe in a process of its own that dies of SIGKILL."""
    command = [sys.executable, "-c", KILLED, what, str(number), str(Path(recipe.__file__))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def outcome(results: dict) -> list[dict]:
    """The stages without what depends on the clock or on having been killed."""
    varies = {"evaluation_seconds", "training_seconds", "training_loss", "resumed_from", "peak_memory_bytes",
              "work_seconds", "work_peak_memory_bytes"}  # fmt: skip
    return [{name: value for name, value in stage.items() if name not in varies} for stage in results["stages"]]


def assert_same(found: Path, expected: Path) -> None:
    """Metrics and weights, bit for bit; and nothing left that only going on needs."""
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (found, expected))
    assert outcome(one) == outcome(other)
    first, second = (hf_attnkit.load_pretrained(folder).state_dict() for folder in (found, expected))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(found.glob("changed-*")) and not (found / "progress.json").exists()


@pytest.mark.parametrize(
    ("recipe", "what", "number", "more"),
    [
        (finetune_glue, "step", 7, ()),
        (uptrain_gqa_glue, "file", 3, (*CONVERTED, "--save_total_limit", "1")),
        (uptrain_gqa_glue, "step", 3, (*CONVERTED, "--lora", "--lora_r", "4", "--distill", "--lora_dropout", "0.1")),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    recipe, what, number, more, checkpoint, tmp_path, monkeypatch
) -> None:  # fmt: skip
    arguments = flags(checkpoint, tmp_path / "killed", *EACH_STEP, *more)
    killed(what, number, recipe, arguments)
    assert not (tmp_path / "killed" / "results.json").exists()
    monkeypatch.setattr(hf_attnkit, "convert_to_gqa", lambda *_, **__: pytest.fail("converted again"))
    results = run(recipe, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    monkeypatch.undo()
    assert results["stages"][-1]["resumed_from"] == str(tmp_path / "killed" / f"checkpoint-{number - 1}")
    run(recipe, monkeypatch, flags(checkpoint, tmp_path / "whole", *EACH_STEP, *more))
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("more", [(), ("--distill", "--lora", "--lora_r", "4")])
def test_a_killed_run_on_text_ends_as_one_that_was_not(
    more, byte_tokenizer, text, tmp_path, monkeypatch
) -> None:  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
        attention_dropout=0.1,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")

    def arguments(name: str) -> list[str]:
        each = ("--validation_file", str(text[1]), "--save_strategy", "steps", "--save_steps", "2", *more)
        return text_runs.flags(tmp_path / "model", tmp_path / name, text, *each)

    with monkeypatch.context() as patched:
        dies(patched, Trainer, "training_step", 4)
        with pytest.raises(Killed):
            text_runs.run(monkeypatch, arguments("killed"))
    results = text_runs.run(monkeypatch, [*arguments("killed"), "--resume_from_checkpoint", "true"])
    assert results["stages"][-1]["resumed_from"].endswith("checkpoint-2")
    text_runs.run(monkeypatch, arguments("whole"))
    assert_same(tmp_path / "killed", tmp_path / "whole")


# Every other moment, in this process: what the run would do next it never does.


class Killed(BaseException):
    pass


def dies(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, *, half: Callable[..., Any] | None = None
) -> None:
    """The call of this number dies: at its start, or after its file (which `half` finds) was written by half."""
    real, calls = getattr(owner, name), []

    def replaced(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) != number:
            return real(*arguments, **options)
        if half is not None:
            real(*arguments, **options)
            file = half(*arguments)
            os.truncate(file, os.path.getsize(file) // 2)
        raise Killed

    monkeypatch.setattr(owner, name, replaced)


def second(_: Any, file: Any, *others: Any) -> Any:
    return file


MOMENTS = {
    "in the baseline's evaluation": (Trainer, "evaluate", 1, None),
    "in the conversion": (hf_attnkit, "convert_to_gqa", 1, None),
    "while the converted model is written": (transformers.modeling_utils, "safe_save_file", 1, second),
    "before the converted model is noted": (restart, "write_json", 2, None),
    "in the second evaluation": (Trainer, "evaluate", 2, None),
    "before the first step": (Trainer, "training_step", 1, None),
    "before the first checkpoint is noted": (restart.WholeCheckpoints, "on_save", 1, None),
    "while a later one's weights are written": (transformers.modeling_utils, "safe_save_file", 4, second),
    "while its state is written": (transformers.TrainerState, "save_to_json", 4, second),
    "while old ones are removed": (restart.shutil, "rmtree", 3, None),
    "in the last evaluation": (Trainer, "evaluate", 3, None),
    "while the trained model is written": (transformers.modeling_utils, "safe_save_file", 10, second),
    "before the results are written": (Trainer, "is_world_process_zero", 1, None),
}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *EACH_STEP, *CONVERTED))
    return output


@pytest.mark.parametrize("moment", MOMENTS)
def test_any_moment_will_do(moment, checkpoint, whole, tmp_path, monkeypatch) -> None:
    owner, name, number, half = MOMENTS[moment]
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED, "--save_total_limit", "1")
    with monkeypatch.context() as patched:
        dies(patched, owner, name, number, half=half)
        with pytest.raises(Killed):
            run(uptrain_gqa_glue, monkeypatch, arguments)
    run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert_same(tmp_path, whole)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_named_checkpoint_is_gone_on_from(checkpoint, whole, tmp_path, monkeypatch) -> None:
    """Also where later ones are whole: they are not, once training goes on before them."""
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED)
    for number, more in ((6, ()), (3, ("--resume_from_checkpoint", str(tmp_path / "checkpoint-2")))):
        with monkeypatch.context() as patched:
            dies(patched, Trainer, "training_step", number)
            with pytest.raises(Killed):
                run(uptrain_gqa_glue, monkeypatch, [*arguments, *more])
    assert json.loads((tmp_path / "progress.json").read_text())["checkpoints"] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="checkpoint-5 is not a whole checkpoint"):
        run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint", str(tmp_path / "checkpoint-5")])
    results = run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint", "true"])
    assert results["stages"][-1]["resumed_from"] == "checkpoint-4"
    assert_same(tmp_path, whole)


def test_a_checkpoint_of_another_folder_is_gone_on_from(
    checkpoint, interrupted, whole, tmp_path, monkeypatch
) -> None:  # fmt: skip
    """After the same evaluation and conversion, which that folder's run had done."""
    named = str(interrupted / "checkpoint-2")
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED, "--resume_from_checkpoint", named)
    assert run(uptrain_gqa_glue, monkeypatch, arguments)["stages"][-1]["resumed_from"] == "checkpoint-2"
    assert_same(tmp_path, whole)


def test_with_nothing_to_go_on_from_a_run_starts(checkpoint, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, [*flags(checkpoint, tmp_path), "--resume_from_checkpoint"])
    assert "resumed_from" not in results["stages"][0] and "training_loss" in results["stages"][0]


def test_the_best_checkpoint_stays(checkpoint, tmp_path, monkeypatch) -> None:
    best = ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--save_total_limit", "1")
    monkeypatch.setattr(Trainer, "_determine_best_metric", lambda self, metrics, trial: first_is_best(self))
    run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, *EACH_STEP, *best))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-8"]


def first_is_best(trainer: Trainer) -> bool:
    is_first = trainer.state.global_step == 1
    if is_first:
        trainer.state.best_global_step, trainer.state.best_metric = 1, 0.0
    return is_first


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "--do_train"], "true"),
        (["--resume_from_checkpoint", "x/checkpoint-5"], "x/checkpoint-5"),
        ([], None),
    ],
)
def test_the_flag_may_stand_alone(given, expected) -> None:
    argv = ["--model_name_or_path", "m", "--task_name", "demo", "--output_dir", "x", "--use_cpu", *given]
    assert parse_arguments(GlueArguments, argv=argv)[1].resume_from_checkpoint == expected


# What is refused.


@pytest.fixture(scope="module")
def interrupted(checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        dies(monkeypatch, Trainer, "training_step", 3)
        with pytest.raises(Killed):
            run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *EACH_STEP, *CONVERTED))
    return output


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (uptrain_gqa_glue, (*CONVERTED,), r"did not end.*resume it with --resume_from_checkpoint"),
        (
            uptrain_gqa_glue,
            (*CONVERTED, "--resume_from_checkpoint", "--learning_rate", "1e-3", "--method", "mean"),
            r"holds another run: learning_rate was 0.01 and is 0.001; method was 'pca' and is 'mean'",
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
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
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


ROUNDS = ("--prune_fraction", "0.5", "--prune_steps", "2", "--score_samples", "32", "--refit_samples", "32")


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
