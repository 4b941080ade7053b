"""Train with `Trainer`: sharded where that is asked for, resumed from a checkpoint, with a quiet console."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

import hf_attnkit
from hf_attnkit.analysis.entropy_callback import PREFIX, core_model
from hf_attnkit.experiment.arguments import ENTROPY_EVERY_N_STEPS
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.resume import Progress, WholeCheckpoints, writing
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.observing.attention_calls import has_softmax

logger = logging.get_logger(__name__)

LOSS = "transfer_loss"  # of each layer that learns features, in the log: transfer_loss/layer_3


def run_trainer(
    trainer: Trainer, progress: Progress, number: int, checkpoint: Path | None, state_file: str
) -> dict[str, Any]:
    """Train; returns seconds and the mean loss, for results.json.

    Args:
        trainer: made for this training; where its model is sharded, a copy of the run's.
        progress: is told of each whole checkpoint.
        number: of this training in the run, from 1.
        checkpoint: to resume from; `None` to start at the first step.
        state_file: takes what the trainer logged, in the run's folder.
    """
    trainer.add_callback(WholeCheckpoints(progress, number, trainer.args.save_total_limit))
    trainer.args = copy.copy(trainer.args)
    trainer.args.save_total_limit = None
    if checkpoint is not None:
        settle_steps(trainer.args, checkpoint)
    with writing(progress.output):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        write_json(progress.output / state_file, asdict(trainer.state))
    facts = {"training_seconds": round(result.metrics["train_runtime"], 2)}
    # After a checkpoint Trainer knows the loss of the rest alone.
    return facts | ({"resumed_from": checkpoint.name} if checkpoint else {"training_loss": result.training_loss})


def settle_steps(training: TrainingArguments, checkpoint: Path) -> None:
    """Write intervals that are shares of a training as the steps that they are in the checkpoint.

    `Trainer` compares the share with the steps, and warns of arguments that do not match where they are the same.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share, steps = getattr(training, name), state.get(name)
        if share is not None and share < 1 and math.ceil(state.get("max_steps", 0) * share) == steps:
            setattr(training, name, steps)


def entropy_callbacks(trainer: Trainer, asked: int | None) -> list[TrainerCallback]:
    """The callback that logs attention entropies, where some layer has them.

    Args:
        asked: steps between two logs; 0 for none, `None` for the default.
    """
    every = ENTROPY_EVERY_N_STEPS if asked is None else asked
    layers = attention_layers(core_model(trainer.model), adapters=True)
    if every and not any(has_softmax(layer.module) for layer in layers):
        logger.warning("no attention entropies are logged: every layer runs linear attention, which has no weights")
        every = 0
    return [hf_attnkit.AttentionEntropyCallback(every)] if every else []


def quiet(trainer: Trainer) -> None:
    """Print nothing that is a number for each layer, which the report draws: it would come between the losses."""
    for printer, replacement in ((ProgressCallback, _Progress), (PrinterCallback, _Printer)):
        if trainer.pop_callback(printer) is not None:
            trainer.add_callback(replacement)


class _Progress(ProgressCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not _is_of_layers(logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


class _Printer(PrinterCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not _is_of_layers(logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


def _is_of_layers(logs: Mapping[str, Any] | None) -> bool:
    return bool(logs) and any(name.startswith((f"{PREFIX}/", f"{LOSS}/")) for name in logs or {})
