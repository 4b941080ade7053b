"""What a training prints and does not print, and intervals of a resumed one."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from support.models import build
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import compare_trainer_and_checkpoint_args, logger

from hf_attnkit.experiment.training.train import quiet, settle_steps


def arguments(folder: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(("disable_tqdm", "printer"), [(True, PrinterCallback), (False, ProgressCallback)])
def test_entropies_are_not_printed_and_losses_are(disable_tqdm, printer, tmp_path, monkeypatch) -> None:
    trainer = Trainer(model=build("bert"), args=arguments(tmp_path, disable_tqdm=disable_tqdm))
    quiet(trainer)
    printed = create_autospec(printer.on_log)
    monkeypatch.setattr(printer, "on_log", printed)
    (mine,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, printer)]
    state, control = TrainerState(), TrainerControl()
    mine.on_log(trainer.args, state, control, logs={"attention_entropy/layer_0/mean": 0.5, "epoch": 1.0})
    assert not printed.called
    mine.on_log(trainer.args, state, control, logs={"loss": 0.5, "epoch": 1.0})
    assert printed.call_args.kwargs["logs"] == {"loss": 0.5, "epoch": 1.0}


def test_a_share_of_the_steps_is_what_the_checkpoint_made_of_it(tmp_path, monkeypatch) -> None:
    state = TrainerState(max_steps=120, logging_steps=3, eval_steps=500, save_steps=60, train_batch_size=8)
    (tmp_path / "trainer_state.json").write_text(json.dumps(vars(state), default=str))
    training = arguments(tmp_path, logging_steps=0.02, eval_steps=500, save_steps=0.5, per_device_train_batch_size=8)
    warned = create_autospec(logger.warning_once)
    monkeypatch.setattr(logger, "warning_once", warned)
    compare_trainer_and_checkpoint_args(training, state)
    assert warned.called
    warned.reset_mock()
    settle_steps(training, tmp_path)
    assert (training.logging_steps, training.eval_steps, training.save_steps) == (3, 500, 60)
    compare_trainer_and_checkpoint_args(training, state)
    assert not warned.called
    # Another share is another argument, of which Transformers may warn.
    training = arguments(tmp_path, logging_steps=0.5)
    settle_steps(training, tmp_path)
    assert training.logging_steps == 0.5
