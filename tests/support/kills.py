"""Kill a run of a recipe, in its own process or in this one, and compare what it resumes to with a whole run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import uptrain_gqa_glue
from support.recipe_runs import flags, run
from support.subprocesses import run_script, together
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)

import hf_attnkit

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


def kill_at(owner: Any, name: str, number: int, chosen: Callable[..., bool], *, half: bool = False) -> None:
    """From here on this process dies before the call of this number that is chosen, or after it wrote half a file."""
    real, seen = getattr(owner, name), []

    def replaced(*arguments: Any, **options: Any) -> Any:
        seen.append(chosen(*arguments))
        now = seen[-1] and sum(seen) == number
        result = None if now and not half else real(*arguments, **options)
        if now and half:
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, replaced)


def dying(what: str, number: int, script: str, arguments: list[str]) -> None:
    if what == "step":
        kill_at(Trainer, "training_step", number, lambda *_: True)
    if what == "file":  # the optimizer's of a checkpoint, half of it
        kill_at(torch, "save", number, lambda _, file, *__: str(file).endswith("optimizer.pt"), half=True)
    run_script(script, arguments)


def killed(what: str, number: int, recipe: Any, arguments: list[str]) -> None:
    """Run a recipe in a process of its own that dies of SIGKILL."""
    (done,) = together([(dying, (what, number, str(Path(recipe.__file__)), arguments))])
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def outcome(results: dict[str, Any]) -> list[dict[str, Any]]:
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


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *EACH_STEP, *CONVERTED))
    return output


@pytest.fixture(scope="module")
def interrupted(checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        dies(monkeypatch, Trainer, "training_step", 3)
        with pytest.raises(Killed):
            run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, output, *EACH_STEP, *CONVERTED))
    return output
