"""What every recipe shares: arguments, measured stages, training with `Trainer`, the report.

A recipe is a `Run` and what it does to the model between two evaluations.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import json
import os
import re
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.table import Table
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

import hf_attnkit
from hf_attnkit.analysis.entropy_callback import core_model
from hf_attnkit.experiment import sharding as sharded
from hf_attnkit.experiment.costs import Laps, machine, time_per_batch
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.report.card import write_card
from hf_attnkit.experiment.report.page import write_report
from hf_attnkit.experiment.report.stage_table import model_name, stage_table
from hf_attnkit.experiment.resume import Progress, WholeCheckpoints, check_weights, identity, with_value, writing
from hf_attnkit.models.cache_size import cache_bytes
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.observing.attention_calls import has_softmax

logger = logging.get_logger(__name__)

ENTROPY_EVERY_N_STEPS = 100
LOGGING_STEPS = 0.02  # Trainer's own 500 leaves most of GLUE's trainings without a point of the loss's curve
EVAL_STEPS = 500  # Trainer's own is its logging_steps
_ONLY_BF16 = "turns the model itself to 16 bits, for training and saving as well; --bf16 does so to computations alone"
REFUSED = {
    "bf16_full_eval": _ONLY_BF16,
    "fp16_full_eval": _ONLY_BF16,
    "dataloader_drop_last": "leaves out dev and test data, too",
    "prediction_loss_only": "leaves nothing to measure by",
}


@dataclass
class RunArguments:
    """What every recipe that trains takes beside `TrainingArguments`."""

    dtype: str = field(
        default="float32",
        kw_only=True,
        metadata={
            "help": "Of the weights; training in 16 bits (--bf16) keeps them in float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    entropy_every_n_steps: int | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": f"Log every layer's attention entropy each so many training steps; 0: never. "
            f"{ENTROPY_EVERY_N_STEPS} by default."
        },
    )


def parse_arguments(
    *kinds: Any, argv: Sequence[str] | None = None, trains: bool = True, saves: bool = True
) -> tuple[Any, ...]:
    """Parse the command line into `kinds` and `TrainingArguments`; refuses what no recipe does.

    Without `--do_train` and `--do_eval` a recipe does both; with one of them, only that. `--predict`, where a recipe
    has it, comes on top.

    Args:
        trains: whether the recipe can train; one that cannot evaluates.
        saves: whether the recipe ends with one model, which it saves.
    """
    argv = with_value(underscored(sys.argv[1:] if argv is None else argv))
    parser = HfArgumentParser((*kinds, TrainingArguments), allow_abbrev=False)
    parser.set_defaults(logging_steps=LOGGING_STEPS, eval_steps=EVAL_STEPS)
    *own, training = parser.parse_args_into_dataclasses(args=argv)
    if training.hub_token is not None:
        # Trainer pickles its arguments into every checkpoint and uploads them; the hub's library reads this, too.
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    # TrainingArguments sets do_eval by itself for --eval_strategy, so what the user asked for is read
    # from the flags alone.
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("--do_train", "--do_eval"):
        flags.add_argument(name, nargs="?", type=string_to_bool, const=True)
    asked, _ = flags.parse_known_args(argv)
    predicts = any(getattr(group, "predict", False) for group in own)
    if any(getattr(group, "only_predicts", False) for group in own):
        if asked.do_train or asked.do_eval or not predicts:
            parser.error("this task has nothing to train on or to measure: give --predict alone")
        asked.do_train = asked.do_eval = False
    if predicts and not saves:
        parser.error("--predict is for recipes that save a model, which this one does not: leave it out")
    if not trains:
        if asked.do_train or asked.do_eval is False:
            parser.error("this recipe evaluates and does not train: leave --do_train and --do_eval out")
        asked.do_train, asked.do_eval = False, True
    training.do_train = asked.do_train if asked.do_train is not None else not asked.do_eval
    training.do_eval = asked.do_eval if asked.do_eval is not None else not asked.do_train
    if not (training.do_train or training.do_eval or predicts):
        parser.error("--do_train False --do_eval False leaves nothing to do")
    if not (saves or training.do_eval):
        parser.error("this recipe compares what it measures: leave --do_train out, or add --do_eval")
    if training.do_predict:
        parser.error("--do_predict is not supported: recipes measure with --do_eval; those for GLUE have --predict")
    for name, why in REFUSED.items():
        if getattr(training, name, False):
            parser.error(f"--{name} {why}: leave it out")
    if not training.eval_do_concat_batches:
        parser.error("--eval_do_concat_batches False leaves the metrics without their inputs: leave it out")
    if not any(argument.split("=")[0] == "--output_dir" for argument in argv):
        parser.error("--output_dir is needed: the folder for results.json and the model")
    return *own, training


def underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with flags spelled one way; Transformers' parser takes `--do-eval` for `--do_eval`, too."""
    return [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]


def require_place(path: str) -> None:
    """Raise `FileNotFoundError` for what can only be a folder and is none; Transformers speaks of the hub then."""
    if (Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise FileNotFoundError(
            f"--model_name_or_path {path} is no folder, nor a name on the hub, which has the form owner/name; name the "
            "folder of a saved model"
        )


class Run(ABC):
    """One task, one model, a list of measured stages.

    A kind of task sets `model`, `tokenizer`, `train_data` and `eval_data` in its `__init__`, after this one. What a
    run that was killed had done is taken over step by step, as the recipe comes to `evaluate`, `change` and `train`.

    Attributes:
        task_name, data: what results.json calls the task and the data that were measured.
        dataset: the same for programs: `id` on the hub or `None`, `name`, `config` and `split` (or `None`), `language`
            (or `None`), and the hub's `task_type`.

    Raises:
        ValueError: an output folder that holds a run which this one does not go on with, a number out of range, an
            option without effect, or a checkpoint to resume from that is none; before anything is loaded.
    """

    model: PreTrainedModel
    tokenizer: Any
    train_data: Any
    eval_data: Any
    task_name: str
    data: str
    dataset: dict[str, str | None]

    def __init__(
        self, arguments: Any, training: TrainingArguments, *others: Any, at_least_one: Sequence[str] = ()
    ) -> None:
        """
        Args:
            others: the recipe's other arguments: a run is gone on with under the same ones only.
            at_least_one: the names of arguments that must be `None` or at least 1.
        """
        self.arguments, self.training = arguments, training
        self.output = Path(str(training.output_dir))
        for name in at_least_one:
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        every = arguments.entropy_every_n_steps
        if every is not None and every < 0:
            raise ValueError(f"--entropy_every_n_steps {every} must be at least 1, or 0 for never")
        if every is not None and not training.do_train:
            raise ValueError(f"--entropy_every_n_steps {every} has no effect without training; leave it out")
        self.progress = Progress(self.output, identity(training, arguments, *others), training)
        # No process writes before all have read.
        training.distributed_state.wait_for_everyone()
        set_seed(training.seed)
        self.stages: list[dict[str, Any]] = []
        self.changes = self.trainings = 0
        self.sharded = sharded.is_asked_for(training)
        self.laps = Laps(training.device)

    @abstractmethod
    def load_model(self, path: str) -> PreTrainedModel:
        """The model of a checkpoint, as this kind of task wants it."""

    @abstractmethod
    def calibration_batches(self, size: int) -> Iterable[Mapping[str, Any]]:
        """Batches from the start of the training data, for scoring or calibration: so many sentences or tokens."""

    @abstractmethod
    def trainer_options(self) -> dict[str, Any]:
        """What `Trainer` needs beside model, arguments, data and tokenizer."""

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
        if self.sharded:
            sharded.keep_whole(trainer)
        return trainer

    def predict(self, trainer: Trainer) -> dict[str, Any]:
        """Write predictions where a kind of task has them and they are asked for; facts for results.json."""
        return {}

    def evaluate(self, stage: str, **facts: Any) -> None:
        """Measure the model and add a stage: "baseline", "changed" or "recovered"."""
        if not self.training.do_eval:
            return
        if len(self.stages) < len(self.progress.stages):
            self.stages.append(self.progress.stages[len(self.stages)])
            return
        trainer = self.trainer()
        work_seconds, work_memory = self.laps.lap()
        measured = self.measure(trainer)
        seconds, memory = self.laps.lap()
        costs = {"work_seconds": round(work_seconds, 2), "evaluation_seconds": round(seconds, 2), **memory}
        if work_memory:
            costs["work_peak_memory_bytes"] = work_memory["peak_memory_bytes"]
        costs |= time_per_batch(trainer, self.eval_data)
        # accelerate marks a model that it prepared, for evaluation too, and takes it as it is from then on: training
        # after an evaluation would run without gradients shared among processes. Its forward is wrapped for autocast.
        for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
            vars(self.model).pop(name, None)
        core = core_model(self.model)
        layers = attention_layers(core, adapters=True)
        heads = [(layer.num_key_value_heads, layer.head_dim) for layer in layers]
        self.stages.append(
            {
                "stage": stage,
                "metrics": measured.pop("metrics"),
                "parameters": core.num_parameters(),  # unlike numel(), of numbers that are packed into bytes too
                "num_heads": [len(layer.heads) for layer in layers],
                "num_key_value_heads": [layer.num_key_value_heads for layer in layers],
                "key_value_bytes_per_token": cache_bytes(heads, core.dtype),
                **costs,
                **measured,
                **facts,
            }
        )
        self.progress.stages = list(self.stages)
        self.progress.write()
        self.laps.lap()

    def change(self, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Change the model, or take over what a run that was killed had changed; returns what `make` did.

        Args:
            make: changes `model` and returns what the recipe needs to know of it, as JSON holds it, or nothing.
        """
        self.changes += 1
        if self.changes > len(self.progress.changes):
            # As a later process would read it.
            facts = json.loads(json.dumps(make() or {}))
            if self.training.do_train:  # which is what takes long enough to be killed
                self.progress.add_change(facts, self.model)
            return facts
        if self.changes == len(self.progress.changes):
            self.model = self.load_model(str(self.progress.changed)).to(self.training.device)
        return self.progress.changes[self.changes - 1]

    def train(self, kind: type[Trainer] = Trainer, **options: Any) -> dict[str, Any]:
        """Train on the training data; returns what `Trainer` measured, or nothing where it was left out or is over.

        A run that is gone on with leaves out the trainings before the last: what follows one must be measured, and
        then either change its model or start from another.

        What the trainer logged stands in trainer_state_1.json, and of a second training in trainer_state_2.json.

        Args:
            kind, options: another trainer, and what it needs beside.
        """
        if not self.training.do_train:
            return {}
        self.trainings += 1
        if self.progress.is_over(self.trainings, self.changes):
            return {}
        # What was measured after this training is measured again: the weights are those of this process.
        del self.progress.stages[len(self.stages) :]
        checkpoint, self.progress.checkpoint = self.progress.checkpoint, None
        if checkpoint is not None:
            check_weights(checkpoint, self.model)
        if self.sharded:
            options["model"] = copy.deepcopy(self.model.cpu())
        trainer = self.trainer(kind, callbacks=self.callbacks(), **options)
        if self.sharded:
            sharded.shard(trainer)
        trainer.add_callback(WholeCheckpoints(self.progress, self.trainings, self.training.save_total_limit))
        trainer.args = copy.copy(trainer.args)
        trainer.args.save_total_limit = None
        with writing(self.output):
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.sharded:
            sharded.gather(trainer.model, self.model.to(self.training.device))
        if trainer.is_world_process_zero():
            write_json(self.output / f"trainer_state_{self.trainings}.json", asdict(trainer.state))
        facts = {"training_seconds": round(result.metrics["train_runtime"], 2)}
        # After a checkpoint Trainer knows the loss of the rest alone.
        return facts | ({"resumed_from": str(checkpoint)} if checkpoint else {"training_loss": result.training_loss})

    def callbacks(self) -> list[hf_attnkit.AttentionEntropyCallback]:
        """What training is given beside Trainer's own."""
        asked = self.arguments.entropy_every_n_steps
        every = ENTROPY_EVERY_N_STEPS if asked is None else asked
        layers = attention_layers(core_model(self.model), adapters=True)
        if every and not any(has_softmax(layer.module) for layer in layers):
            logger.warning("no attention entropies are logged: every layer runs linear attention, which has no weights")
            every = 0
        return [hf_attnkit.AttentionEntropyCallback(every)] if every else []

    def results(self, **facts: Any) -> dict[str, Any]:
        """What results.json holds: the stages, these facts, and what it takes to repeat them."""
        return {
            "task": self.task_name,
            "data": self.data,
            "dataset": self.dataset,
            "model": self.arguments.model_name_or_path,
            "stages": self.stages,
            **facts,
            "train_samples": len(self.train_data),
            "seed": self.training.seed,
            "device": machine(self.training),
            "command": command(getattr(self.arguments, "command", None) or sys.argv),
            "versions": {name: version(name) for name in ("hf_attnkit", "transformers", "torch", "accelerate")},
        }

    def finish(self, **facts: Any) -> None:
        """Save model and tokenizer, predict, write the model card, then `results.json`, whose presence marks a finished
        run; print the table. The report comes after: it can be made again from the folder."""
        trainer = self.trainer()
        with writing(self.output):
            trainer.save_model(str(self.output), _internal_call=True)  # a push comes last, when all is there
        results = self.results(**facts, **self.predict(trainer))
        if trainer.is_world_process_zero():
            write_card(self.output, results, name=self.training.hub_model_id or model_name(str(self.output.resolve())))
            write_json(self.output / "results.json", results)
            self.progress.remove()
            write_report(self.output)
            print_stages(results)
        if self.training.push_to_hub:
            trainer.create_model_card = lambda **_: None  # it would write its own over ours
            trainer.push_to_hub()
        # Not now: the processes may have more runs before them.
        atexit.register(PartialState().destroy_process_group)


def command(argv: Sequence[str]) -> str:
    """The command line as one would type it, without secrets: it is saved with the model and may be published."""
    shown = ["python", *argv]
    for place, word in enumerate(shown):
        name, equals, _ = word.partition("=")
        if name in ("--hub_token", "--hub-token"):
            shown[place : place + 2 - len(equals)] = [f"{name}=..."]
    return shlex.join(shown)


# A terminal is narrow; the report has them.
NOT_PRINTED = ("KV bytes/token", "peak MiB", "work seconds", "work peak MiB")


def print_stages(results: Mapping[str, Any]) -> None:
    """Print the stages of a run as a table."""
    header, rows = stage_table(results["stages"])
    shown = [place for place, name in enumerate(header) if name not in NOT_PRINTED]
    table = Table(title=f"{results['task']} ({results['data']}), {model_name(results['model'])}")
    for place in shown:
        table.add_column(header[place], justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*(row[place].text for place in shown))
    show(table)
