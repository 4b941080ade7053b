"""What the GLUE recipes share: arguments, data, evaluation, training with `Trainer`, the report.

A recipe is a `GlueRun` and what it does to the model between two evaluations.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from glue_data import load_glue
from glue_metric import GlueMetric
from glue_tasks import Task, get_task
from report import show, write_json
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import string_to_bool

import hf_attnkit
from hf_attnkit.families import attention_layers


@dataclass
class GlueArguments:
    """Model and data; the names are those of Transformers' run_glue.py."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the model and its tokenizer."})
    task_name: str = field(
        metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or demo (made here, not GLUE)."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder in the GLUE benchmark's TSV layout; the hub's nyu-mll/glue by default."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first this many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first this many."})
    max_length: int = field(default=128, metadata={"help": "Longer inputs are truncated, in tokens."})


def parse_arguments(*kinds: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line into `kinds` and `TrainingArguments`; refuses what no recipe does.

    Without `--do_train` and `--do_eval` a recipe does both; with one of them, only that.
    """
    parser = HfArgumentParser((*kinds, TrainingArguments))
    *own, training = parser.parse_args_into_dataclasses(args=argv)
    # TrainingArguments sets do_eval by itself for --eval_strategy, so what the user asked for is read
    # from the flags alone.
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("--do_train", "--do_eval"):
        flags.add_argument(name, nargs="?", type=string_to_bool, const=True)
    asked, _ = flags.parse_known_args(argv)
    training.do_train = asked.do_train if asked.do_train is not None else not asked.do_eval
    training.do_eval = asked.do_eval if asked.do_eval is not None else not asked.do_train
    if not (training.do_train or training.do_eval):
        parser.error("--do_train False --do_eval False leaves nothing to do")
    if training.do_predict:
        parser.error("--do_predict is not supported: the labels of GLUE's test sets are not public")
    given = sys.argv if argv is None else argv
    if not any(argument.split("=")[0] == "--output_dir" for argument in given):
        parser.error("--output_dir is needed: the folder for results.json and the model")
    return *own, training


def describe(task: Task) -> str:
    """What the numbers were measured on, for every place that shows them."""
    return "GLUE dev set" if task.folder else "demo data made by this project, not GLUE"


class GlueRun:
    """One task, one model, a list of measured stages.

    Raises:
        ValueError, FileNotFoundError: unknown task, bad data, a number of samples below 1, or an
            output folder that holds a finished run; all before the model is loaded.
    """

    def __init__(self, arguments: GlueArguments, training: TrainingArguments) -> None:
        self.arguments, self.training = arguments, training
        self.output = Path(str(training.output_dir))
        if (self.output / "results.json").exists():
            raise ValueError(f"--output_dir {self.output} holds a finished run (results.json); name another folder")
        for name in ("max_train_samples", "max_eval_samples", "max_length"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        checkpoint = training.resume_from_checkpoint
        if checkpoint is not None and not Path(checkpoint).is_dir():
            raise ValueError(f"--resume_from_checkpoint {checkpoint} is no folder; name one such as .../checkpoint-500")
        self.task = get_task(arguments.task_name)
        data = load_glue(arguments.task_name, arguments.data_dir)
        set_seed(training.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.label_ids = list(range(self.task.num_labels))  # GLUE's class id -> the model's
        self.model = self._load_model()
        with training.main_process_first(desc="tokenizing"):
            self.train_data = self._tokenized(data["train"], arguments.max_train_samples)
            self.dev_data = {
                name: self._tokenized(data[name], arguments.max_eval_samples) for name in self.task.dev_splits
            }
        self.stages: list[dict[str, Any]] = []

    def _load_model(self) -> PreTrainedModel:
        path, names = self.arguments.model_name_or_path, self.task.label_names
        own = AutoConfig.from_pretrained(path).label2id or {}
        options: dict[str, Any] = {"num_labels": self.task.num_labels}
        if names and set(own) == set(names):
            # A checkpoint of this task that numbers the classes its own way keeps doing so.
            self.label_ids = [own[name] for name in names]
        elif names:
            options["id2label"] = dict(enumerate(names))
            options["label2id"] = {name: index for index, name in enumerate(names)}
        model = hf_attnkit.load_pretrained(path, AutoModelForSequenceClassification, **options)
        attention_layers(model)  # refuses a family that cannot be reported on before hours of training
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _tokenized(self, split: Any, limit: int | None) -> Any:
        split = split if limit is None else split.select(range(min(limit, len(split))))
        columns, tokenizer, max_length = self.task.text_columns, self.tokenizer, self.arguments.max_length
        label_ids = None if self.task.is_regression else self.label_ids

        def encode(rows: dict[str, list]) -> dict[str, Any]:
            encoded = dict(tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length))
            return encoded | {"labels": [label_ids[label] if label_ids else label for label in rows["label"]]}

        return split.map(
            encode,
            batched=True,
            remove_columns=split.column_names,
            desc="tokenizing",
        )

    def training_batches(self, num_samples: int) -> Iterable[Mapping[str, Any]]:
        """Batches of the first `num_samples` training sentences, for scoring or calibration."""
        rows = self.train_data.select(range(min(num_samples, len(self.train_data))))
        return DataLoader(rows, self.training.per_device_eval_batch_size, collate_fn=self.collator)

    def _trainer(self) -> Trainer:
        # A new one each time: an optimizer made before a change of heads holds the old parameters.
        return Trainer(
            model=self.model,
            args=self.training,
            train_dataset=self.train_data,
            eval_dataset=next(iter(self.dev_data.values())),
            data_collator=self.collator,
            processing_class=self.tokenizer,
            compute_metrics=self._metrics,
        )

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if self.task.is_regression:
            answers, references = logits.squeeze(-1), prediction.label_ids
        else:
            glue_ids = np.argsort(self.label_ids)  # the model's class id -> GLUE's
            answers, references = glue_ids[logits.argmax(-1)], glue_ids[prediction.label_ids]
        return GlueMetric(self.task.name).compute(predictions=answers, references=references)

    def evaluate(self, stage: str, **facts: Any) -> None:
        """Measure the model on the dev set(s) and add a stage: "baseline", "changed" or "recovered"."""
        if not self.training.do_eval:
            return
        trainer, metrics = self._trainer(), {}
        start = time.perf_counter()
        for name, rows in self.dev_data.items():
            measured = trainer.evaluate(rows, metric_key_prefix=name)
            suffix = name.removeprefix("validation")  # "", "_matched" or "_mismatched"
            metrics.update({f"{metric}{suffix}": measured[f"{name}_{metric}"] for metric in self.task.metrics})
        layers = attention_layers(self.model)
        self.stages.append(
            {
                "stage": stage,
                "metrics": metrics,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "num_heads": [layer.num_heads for layer in layers],
                "num_key_value_heads": [layer.num_key_value_heads for layer in layers],
                "dev_samples": sum(len(rows) for rows in self.dev_data.values()),
                "evaluation_seconds": round(time.perf_counter() - start, 2),
                **facts,
            }
        )

    def train(self) -> dict[str, Any]:
        """Fine-tune on the training split; returns what `Trainer` measured, or nothing where it was left out."""
        if not self.training.do_train:
            return {}
        checkpoint = self.training.resume_from_checkpoint
        result = self._trainer().train(resume_from_checkpoint=checkpoint)
        facts = {"training_seconds": round(result.metrics["train_runtime"], 2), "training_loss": result.training_loss}
        return facts | ({"resumed_from": checkpoint} if checkpoint else {})

    def finish(self, **facts: Any) -> None:
        """Save model and tokenizer, then `results.json`, whose presence marks a finished run; print the table."""
        trainer = self._trainer()
        trainer.save_model(str(self.output))
        results = {
            "task": self.task.name,
            "data": describe(self.task),
            "model": self.arguments.model_name_or_path,
            "stages": self.stages,
            **facts,
            "train_samples": len(self.train_data),
            "seed": self.training.seed,
            "command": shlex.join(["python", *sys.argv]),
            "versions": {name: version(name) for name in ("hf_attnkit", "transformers", "torch", "accelerate")},
        }
        if trainer.is_world_process_zero():
            write_json(self.output / "results.json", results)
            print_stages(results)
        trainer.accelerator.end_training()


def print_stages(results: Mapping[str, Any]) -> None:
    """Print the stages of a run as a table."""
    stages = results["stages"]
    table = Table(title=f"{results['task']} ({results['data']}), {Path(results['model']).name}")
    table.add_column("stage")
    metrics = list(stages[0]["metrics"]) if stages else []
    for name in [*metrics, "heads", "key/value heads", "parameters"]:
        table.add_column(name, justify="right")
    for stage in stages:
        table.add_row(
            stage["stage"],
            *(f"{stage['metrics'][name]:.4f}" for name in metrics),
            _heads(stage["num_heads"]),
            _heads(stage["num_key_value_heads"]),
            f"{stage['parameters']:,}",
        )
    show(table)


def _heads(per_layer: Sequence[int]) -> str:
    """`6 x 12` for equal layers, otherwise each layer's number."""
    runs = [(number, len(list(run))) for number, run in itertools.groupby(per_layer)]
    return f"{runs[0][1]} x {runs[0][0]}" if len(runs) == 1 else " ".join(str(number) for number in per_layer)
