"""A run: one task, one model, what is done to it, and the stages that are measured.

A recipe is a `Run` and what it does to the model between two evaluations:

    run = GlueRun(arguments, training, own)
    run.evaluate("baseline")
    run.change(lambda: hf_attnkit.prune_heads(run.model, {0: [1]}), kind="pruning", title="one head removed")
    run.evaluate("changed")
    run.evaluate("recovered", **run.train())
    run.finish()
"""

from __future__ import annotations

import copy
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_attnkit.experiment import publishing, sharding
from hf_attnkit.experiment.costs import Laps
from hf_attnkit.experiment.evaluating import measure_stage
from hf_attnkit.experiment.record import Change, Data, describe_model
from hf_attnkit.experiment.resume import Progress, check_weights, identity
from hf_attnkit.experiment.timing import Model
from hf_attnkit.experiment.training.train import entropy_callbacks, quiet, run_trainer
from hf_attnkit.models.global_reads import expect_global_reads


class Run(ABC):
    """One task, one model, a list of measured stages.

    A kind of task sets `model`, `tokenizer`, `train_data`, `eval_data`, `task_name` and `data` in its `__init__`, after
    this one. What a killed run had done is taken over step by step, as the recipe comes to `evaluate`, `change` and
    `train`.

    Attributes:
        task_name: what results.json calls the task.
        data: the data that is read.
        done: what was done to the model so far; `None` where nothing was.
        rounds: how often the recipe trains the changed model; `control` trains as long in one go.

    Raises:
        ValueError: an output folder that holds a run which this one does not resume, a number out of range, an option
            without effect, or a checkpoint to resume from that is none; before anything is loaded.
    """

    model: PreTrainedModel
    tokenizer: Any
    train_data: Any
    eval_data: Any
    task_name: str
    data: Data

    def __init__(
        self, arguments: Any, training: TrainingArguments, *others: Any, at_least_one: Sequence[str] = ()
    ) -> None:
        """
        Args:
            others: the recipe's other arguments: a run is resumed under the same ones only.
            at_least_one: the names of arguments that must be `None` or at least 1.
        """
        expect_global_reads()  # a tokenizer looks at the config, too
        self.arguments, self.training = arguments, training
        self.output = Path(str(training.output_dir))
        for name in at_least_one:
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        every = arguments.entropy_every_n_steps
        if every is not None and every < 0:
            raise ValueError(f"--entropy_every_n_steps {every} must be at least 1, or 0 for none")
        if every is not None and not training.do_train:
            raise ValueError(f"--entropy_every_n_steps {every} has no effect without training; leave it out")
        self.wants_control = any(getattr(other, "control", False) for other in others)
        if self.wants_control and not (training.do_train and training.do_eval):
            raise ValueError(
                "--control trains and measures the untouched model: give --do_train and --do_eval, or none"
            )
        self.progress = Progress(self.output, identity(training, arguments, *others), training)
        # No process writes before all have read.
        training.distributed_state.wait_for_everyone()
        set_seed(training.seed)
        self.stages: list[dict[str, Any]] = []
        self.changes = self.trainings = 0
        self.rounds = 1
        self.done: Change | None = None
        self.has_trained = self.has_control = self._is_control = False
        self.sharded = sharding.is_asked_for(training)
        self.laps = Laps(training.device)

    @abstractmethod
    def load_model(self, path: str) -> PreTrainedModel:
        """The model of a checkpoint, as this kind of task wants it."""

    def load_untouched(self) -> PreTrainedModel:
        """The model that the run started from."""
        return self.load_model(self.arguments.model_name_or_path)

    @abstractmethod
    def calibration_batches(self, size: int) -> Iterable[Mapping[str, Any]]:
        """Batches from the start of the training data, for scoring or calibration: so many sentences or tokens."""

    @abstractmethod
    def trainer_options(self) -> dict[str, Any]:
        """What `Trainer` needs in addition to model, arguments, data and tokenizer."""

    @abstractmethod
    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Evaluate: `{"metrics": {name: value}}` and how much data that was."""

    def trainer(self, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
        """A new one each time: an optimizer made before a change of heads holds the old parameters."""
        made = {
            "model": self.model,
            "args": self.training,
            "train_dataset": self.train_data,
            "eval_dataset": self.eval_data,
            "processing_class": self.tokenizer,
            **self.trainer_options(),
        }
        trainer = kind(**(made | options))
        quiet(trainer)
        if self.sharded:
            sharding.keep_whole(trainer)
        return trainer

    def predict(self, trainer: Trainer) -> dict[str, Any]:
        """Write predictions where a kind of task has them and they are asked for; facts for results.json."""
        return {}

    @property
    def started_from(self) -> dict[str, Any]:
        """The model that the run started from, for results.json."""
        return describe_model(self.arguments.model_name_or_path, self.model)

    def evaluate(self, stage: str, **facts: Any) -> None:
        """Measure the model and add a stage, such as "baseline", "changed" or "recovered"; nothing without `--do_eval`.

        Args:
            facts: what else results.json says of the stage.
        """
        if not self.training.do_eval:
            return
        if len(self.stages) < len(self.progress.stages):
            self.stages.append(self.progress.stages[len(self.stages)])
            return
        record = measure_stage(self.trainer(), self.measure, self.laps)
        self.stages.append({"stage": stage, **record, **facts})
        self.progress.stages = list(self.stages)
        self.progress.write()
        self.laps.lap()

    def change(
        self, make: Callable[[], Any], *, kind: str, title: str, facts: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Change the model, or take over what a killed run had changed; returns what `make` returned.

        With `--control` the untouched model is trained first, unless the recipe has called `control`.

        Args:
            make: changes `model`; what it returns, a dictionary as JSON holds it, is kept for a resumed run. Anything
                else that it returns is left out.
            kind, title, facts: what results.json says of the change, see `Change`. Of several changes the last counts.
        """
        self.control()
        self.done = Change(kind, title, dict(facts or {}))
        self.changes += 1
        if self.changes > len(self.progress.changes):
            made = make()
            # As a later process would read it.
            found: dict[str, Any] = json.loads(json.dumps(made if isinstance(made, dict) else {}))
            if self.training.do_train:  # which is what takes long enough to be killed
                self.progress.add_change(found, self.model)
            return found
        if self.changes == len(self.progress.changes):
            self.model = self.load_model(str(self.progress.changed)).to(self.training.device)
        return self.progress.changes[self.changes - 1]

    def control(self, train: Callable[[], dict[str, Any]] | None = None) -> None:
        """With `--control`, train a copy of the untouched model as long as the changed one will be, and measure it.

        The model and the random state stay as they are, so that the other stages are those of a run without it.

        Args:
            train: trains `model` as the changed one will be, and returns what `train` returns.
        """
        if not self.wants_control or self.has_control:
            return
        self.has_control = self._is_control = True
        has_trained = self.has_trained
        if self.progress.is_over(self.trainings + 1, self.changes):
            self.trainings += 1
            self.evaluate("control")
        else:
            untouched = self.model.to("cpu")
            with _random_state_kept():
                self.model = copy.deepcopy(untouched).to(self.training.device)
                facts = (train or self.train)()
                self.evaluate("control", **facts)
            self.model = untouched.to(self.training.device)
            self.progress.end(self.trainings)
        self._is_control, self.has_trained = False, has_trained

    def train(self, kind: type[Trainer] = Trainer, **options: Any) -> dict[str, Any]:
        """Train on the training data; returns seconds and loss, or nothing where training was left out or is over.

        A resumed run leaves out the trainings before the last: what follows one must be measured, and then either
        change its model or start from another. What the trainer logged is in trainer_state_1.json, of a second training
        in trainer_state_2.json, and of the control in control_state.json.

        Args:
            kind, options: another trainer, and what else it needs; with `callbacks` in place of the entropies.
        """
        if not self.training.do_train:
            return {}
        self.trainings += 1
        self.has_trained = True
        if self.done is None and not self._is_control:
            self.done = Change("fine-tuning", "fine-tuned", {})
        if self.progress.is_over(self.trainings, self.changes):
            return {}
        # What was measured after this training is measured again: the weights are those of this process.
        del self.progress.stages[len(self.stages) :]
        checkpoint, self.progress.checkpoint = self.progress.checkpoint, None
        if checkpoint is not None:
            check_weights(checkpoint, self.model)
        if self.sharded:
            options["model"] = copy.deepcopy(self.model.cpu())
        if self._is_control and self.rounds > 1:
            options["args"] = self._longer(self.rounds)
        callbacks = options.pop("callbacks", None)
        trainer = self.trainer(kind, **options)
        if callbacks is None:
            callbacks = entropy_callbacks(trainer, self.arguments.entropy_every_n_steps)
        for callback in callbacks:
            trainer.add_callback(callback)
        if self.sharded:
            sharding.shard(trainer)
        number = self.trainings - (self.has_control and not self._is_control)
        state = "control_state.json" if self._is_control else f"trainer_state_{number}.json"
        facts = run_trainer(trainer, self.progress, self.trainings, checkpoint, state)
        if self.sharded:
            sharding.gather(trainer.model, self.model.to(self.training.device))
        return facts

    def _longer(self, times: int) -> TrainingArguments:
        training = copy.copy(self.training)
        training.num_train_epochs *= times
        training.max_steps *= times  # -1 stays below 0, where the epochs count
        return training

    def models(self) -> list[Model]:
        """What makes each model of the run again, the untouched one first and the final one last."""

        def untouched() -> PreTrainedModel:
            with _silence():  # everything about this checkpoint was said when it was loaded first
                return self.load_untouched()

        def of(folder: Path) -> Model:
            return lambda: self.load_model(str(folder))

        return [untouched, *(of(folder) for folder in self.progress.earlier()), lambda: self.model]

    def results(self, **facts: Any) -> dict[str, Any]:
        """What results.json holds: the stages, these settings of the recipe, and what it takes to repeat them."""
        return publishing.results(self, **facts)

    def finish(self, **facts: Any) -> None:
        """Save, predict, time the stages, and write results.json, the model card and the report; print the table.

        Args:
            facts: the recipe's own settings.
        """
        publishing.publish(self, **facts)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _silence() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
