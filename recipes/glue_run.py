"""What the GLUE recipes share: arguments, data, the task's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from base_run import Run
from glue_data import load_glue
from glue_metric import GlueMetric
from glue_tasks import Task, get_task
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

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


def describe(task: Task) -> str:
    """What the numbers were measured on, for every place that shows them."""
    return "GLUE dev set" if task.folder else "demo data made by this project, not GLUE"


def prepare_padding(tokenizer: Any) -> None:
    """Pad at the end, with a token that is none of a text's own.

    A decoder is asked at its last token that is not padding, so the padding token must not be the one that texts
    end in; and at the end, padding moves no position.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is not None:
        return
    ends_in_eos = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    tokenizer.pad_token = tokenizer.unk_token if ends_in_eos else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token, and none that could serve (the end of text, where texts do not end in "
            "it, or the unknown token): give it one (tokenizer.pad_token = ...) and save it"
        )


class GlueRun(Run):
    """A GLUE task; measured on its dev set(s).

    Raises:
        ValueError, FileNotFoundError: unknown task, bad data, and as `Run`; all before the model is loaded.
    """

    def __init__(
        self, arguments: GlueArguments, training: TrainingArguments, *others: Any, **load_options: Any
    ) -> None:
        """
        Args:
            others: as `Run`.
            load_options: of `load_pretrained`.
        """
        limits = ("max_train_samples", "max_eval_samples", "max_length")
        super().__init__(arguments, training, *others, at_least_one=limits)
        self.load_options = load_options
        self.task = get_task(arguments.task_name)
        self.task_name, self.data = self.task.name, describe(self.task)
        data = load_glue(arguments.task_name, arguments.data_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        prepare_padding(self.tokenizer)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.label_ids = list(range(self.task.num_labels))  # GLUE's class id -> the model's
        self.model = self.load_model(arguments.model_name_or_path)
        with training.main_process_first(desc="tokenizing"):
            self.train_data = self._tokenized(data["train"], arguments.max_train_samples)
            self.dev_data = {
                name: self._tokenized(data[name], arguments.max_eval_samples) for name in self.task.dev_splits
            }
        self.eval_data = next(iter(self.dev_data.values()))

    def load_model(self, path: str) -> PreTrainedModel:
        """A classifier with the task's classes."""
        names = self.task.label_names
        own = AutoConfig.from_pretrained(path).label2id or {}
        options: dict[str, Any] = self.load_options | {"num_labels": self.task.num_labels}
        if names and set(own) == set(names):
            # A checkpoint of this task that numbers the classes its own way keeps doing so.
            self.label_ids = [own[name] for name in names]
        elif names:
            options["id2label"] = dict(enumerate(names))
            options["label2id"] = {name: index for index, name in enumerate(names)}
        model = hf_attnkit.load_pretrained(path, AutoModelForSequenceClassification, **options)
        attention_layers(model)  # refuses a family that cannot be reported on before hours of training
        embeddings = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > embeddings:
            raise ValueError(
                f"the tokenizer of {path} has {len(self.tokenizer)} tokens and the model {embeddings} embeddings: give "
                "the model's own tokenizer, or resize_token_embeddings"
            )
        # A decoder looks for the last token that is not this one, whatever its config said.
        model.config.pad_token_id = self.tokenizer.pad_token_id
        # These losses are means over a batch and ignore `num_items_in_batch`; told so, Trainer divides them by the
        # number of accumulated batches and does not multiply them by the number of processes.
        model.accepts_loss_kwargs = False
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

    def calibration_batches(self, size: int) -> Iterable[Mapping[str, Any]]:
        """Batches of the first `size` training sentences, like lengths together, so that little is padding."""
        rows = self.train_data.select(range(min(size, len(self.train_data))))
        rows = rows.select(np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable"))
        return DataLoader(rows, self.training.per_device_eval_batch_size, collate_fn=self.collator)

    def trainer_options(self) -> dict[str, Any]:
        """Padding, and the task's metrics."""
        return {"data_collator": self.collator, "compute_metrics": self._metrics}

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if self.task.is_regression:
            answers, references = logits.squeeze(-1), prediction.label_ids
        else:
            glue_ids = np.argsort(self.label_ids)  # the model's class id -> GLUE's
            answers, references = glue_ids[logits.argmax(-1)], glue_ids[prediction.label_ids]
        return GlueMetric(self.task.name).compute(predictions=answers, references=references)

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """The task's metrics on its dev set(s)."""
        metrics = {}
        for name, rows in self.dev_data.items():
            measured = trainer.evaluate(rows, metric_key_prefix=name)
            suffix = name.removeprefix("validation")  # "", "_matched" or "_mismatched"
            metrics.update({f"{metric}{suffix}": measured[f"{name}_{metric}"] for metric in self.task.metrics})
        return {"metrics": metrics, "dev_samples": sum(len(rows) for rows in self.dev_data.values())}
