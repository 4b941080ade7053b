"""What the GLUE recipes share: arguments, data, the task's metrics, predictions."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from hf_attnkit.experiment.arguments import RunArguments, require_place
from hf_attnkit.experiment.glue.data import load_glue, load_test
from hf_attnkit.experiment.glue.inputs import check_max_length, tokenized
from hf_attnkit.experiment.glue.metric import GlueMetric
from hf_attnkit.experiment.glue.predictions import write_predictions
from hf_attnkit.experiment.glue.splits import needed_splits
from hf_attnkit.experiment.glue.tasks import get_task, task_names
from hf_attnkit.experiment.record import Data
from hf_attnkit.experiment.run import Run
from hf_attnkit.models.layers import attention_layers


@dataclass
class GlueArguments(RunArguments):
    """Model and data; the names are those of Transformers' run_glue.py."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of model and tokenizer; {task} and {seed} become those of the run."}
    )
    task_name: str = field(
        metadata={
            "help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, several with commas between, all (of these), "
            "ax (the diagnostic set, to predict alone), demo (made by this project, not GLUE), or another row of TASKS."
        }
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Run with each of these seeds and report mean and standard deviation."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in the GLUE benchmark's TSV layout or saved by datasets; by default the task's dataset on "
            "the hub, nyu-mll/glue for those of GLUE."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many examples, the first ones."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many examples, the first ones."})
    max_length: int = field(default=128, metadata={"help": "Longer inputs are truncated, in tokens."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new head where the model's has another number of classes."}
    )
    predict: bool = field(
        default=False, metadata={"help": "Also write the final model's test predictions as the GLUE server takes them."}
    )
    command: list[str] | None = field(default=None, init=False)  # what repeats this run alone, where it is one of many

    def __post_init__(self) -> None:
        task_names(self.task_name)
        seeds = self.seeds or []
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"--seeds {seed} must be from 0 to 2^32 - 1")
            if seeds.count(seed) > 1:
                raise ValueError(f"--seeds names {seed} twice; name each seed once")

    @property
    def only_predicts(self) -> bool:
        """Whether the task has nothing to train on or to measure."""
        return self.task_name == "ax"


def prepare_padding(tokenizer: Any) -> None:
    """Pad at the end, with a token that is none of a text's own.

    A decoder is asked at its last token that is not padding, so the padding token must not be the one that texts
    end in; and at the end, padding moves no position.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    tokenizer.padding_side = "right"
    ends_in_eos = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    if tokenizer.pad_token is not None and not (ends_in_eos and tokenizer.pad_token_id == tokenizer.eos_token_id):
        return
    ending = None if ends_in_eos else tokenizer.eos_token
    if (ending or tokenizer.unk_token) is None:
        raise ValueError(
            "the tokenizer has no padding token of its own, and none that could serve (the end of text, where texts do "
            "not end in it, or the unknown token): give it one (tokenizer.pad_token = ...) and save it"
        )
    tokenizer.pad_token = ending or tokenizer.unk_token


class GlueRun(Run):
    """A GLUE task; measured on its dev set(s).

    Raises:
        ValueError, FileNotFoundError: unknown task, bad data, and as `Run`, before the model is loaded; a length that
            the model cannot take, before anything is tokenized.
    """

    def __init__(
        self,
        arguments: GlueArguments,
        training: TrainingArguments,
        *others: Any,
        load_options: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            others: as `Run`. Where one has a true `reads_training_data`, training data is read without training, too.
            load_options: of `load_pretrained`.
        """
        limits = ("max_train_samples", "max_eval_samples", "max_length")
        super().__init__(arguments, training, *others, at_least_one=limits)
        require_place(arguments.model_name_or_path)
        self.load_options = load_options or {}
        if arguments.seeds:
            raise ValueError("--seeds has no effect on this recipe, which makes one run; give --seed")
        self.task = get_task(arguments.task_name)
        if self.task.is_regression and training.label_smoothing_factor:
            raise ValueError(
                f"--label_smoothing_factor {training.label_smoothing_factor} has no meaning for the scores of "
                f"{self.task.name!r}; leave it out"
            )
        self.task_name = self.task.name
        if not self.task.is_labelled and any(getattr(other, "reads_training_data", False) for other in others):
            raise ValueError(
                f"task {self.task_name!r} has no training data, which this recipe needs; see finetune_glue.py"
            )
        source = (arguments.task_name, arguments.data_dir)
        splits = needed_splits(self.task, training, others)
        data = load_glue(*source, splits) if splits else {}
        tests = load_test(*source) if arguments.predict else {}
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        prepare_padding(self.tokenizer)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.label_ids = list(range(self.task.num_labels))  # GLUE's class id -> the model's
        self.model = self.load_model(arguments.model_name_or_path)
        check_max_length(arguments.max_length, self.task, self.tokenizer, self.model)
        with training.main_process_first(desc="tokenizing"):
            self.train_data = self._tokenized("train", data, arguments.max_train_samples)
            self.dev_data = {
                name: self._tokenized(name, data, arguments.max_eval_samples) for name in self.task.dev_splits
            }
            self.test_data = {name: self._tokenized(name, tests) for name in tests}
        self.eval_data = next(iter(self.dev_data.values()), None)
        self.data = self._describe_data(data)

    def load_model(self, path: str) -> PreTrainedModel:
        """A classifier with the task's classes."""
        names = self.task.label_names
        own = AutoConfig.from_pretrained(path).label2id or {}
        options: dict[str, Any] = self.load_options | {
            "num_labels": self.task.num_labels,
            # Not as saved: small steps would be lost in the rounding of 16-bit weights.
            "dtype": self.arguments.dtype,
            "ignore_mismatched_sizes": self.arguments.ignore_mismatched_sizes,
            # A model remembers it from its last task, and a score would train on the loss of a single class.
            "problem_type": "regression" if self.task.is_regression else "single_label_classification",
        }
        own = {name.lower(): number for name, number in own.items()}
        if names and set(own) == set(names):
            # A checkpoint of this task keeps its own numbers of the classes.
            self.label_ids = [own[name] for name in names]
        elif not self.task.is_labelled:
            raise ValueError(
                f"{path} has the classes {list(own)}, but {self.task.name} is for a model of mnli, with "
                f"{', '.join(names)}; name one, or write id2label and label2id into its config.json"
            )
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

    def _describe_data(self, data: Mapping[str, Any]) -> Data:
        """What is read of `data`, the labelled splits; test data to predict has no part in the numbers."""
        task, measured = self.task, {name: rows for name, rows in self.dev_data.items() if len(rows)}
        used, there = (sum(len(rows[name]) for name in measured) for rows in (measured, data))
        local = "demo" if task.name == "demo" else "local"
        return Data(
            name=task.folder,
            hub_path=local if self.arguments.data_dir is not None or task.hub_path is None else task.hub_path,
            task_type="text-classification",
            config=task.hub_config,
            train_split="train" if len(self.train_data) else None,
            evaluation_split=", ".join(measured) or None,
            train_examples=len(self.train_data) or None,
            evaluation_examples=used or None,
            language=task.language,
            is_benchmark=task.is_benchmark,
            note=f"a part of the dev set, the first {used:,} of {there:,}" if used < there else None,
        )

    def _tokenized(self, name: str, data: Mapping[str, Any], limit: int | None = None) -> Any:
        """Inputs of one split of `data`, at most the first `limit`; none where there is no such split."""
        if name not in data:
            return []
        rows = data[name] if limit is None else data[name].select(range(min(limit, len(data[name]))))
        label_ids = None if self.task.is_regression else self.label_ids
        options = (self.task, self.tokenizer, self.arguments.max_length, label_ids)
        return tokenized(name, rows, *options, warn=self.training.local_process_index == 0)

    def calibration_batches(self, size: int) -> Iterable[Mapping[str, Any]]:
        """Batches of the first `size` training sentences, sentences of similar length together to save padding.

        Raises:
            RuntimeError: no training data was read.
        """
        if not len(self.train_data):
            raise RuntimeError(
                "no training data was read, since nothing is trained: give one of the recipe's arguments classes "
                "`reads_training_data = True`"
            )
        return self.batches_of(range(min(size, len(self.train_data))))

    def batches_of(self, numbers: Sequence[int]) -> Iterable[Mapping[str, Any]]:
        """Batches of these training sentences, those of similar length together."""
        rows = self.train_data.select(numbers)
        rows = rows.select(np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable"))
        return DataLoader(rows, self.training.per_device_eval_batch_size, collate_fn=self.collator)

    def trainer_options(self) -> dict[str, Any]:
        """Padding, and the task's metrics."""
        return {"data_collator": self.collator, "compute_metrics": self._metrics}

    def _answers(self, predictions: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        """GLUE's class ids, or scores, `(examples,)`, from the model's outputs."""
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        return logits.squeeze(-1) if self.task.is_regression else np.argsort(self.label_ids)[logits.argmax(-1)]

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        references = prediction.label_ids
        if not self.task.is_regression:
            references = np.argsort(self.label_ids)[references]  # the model's class id -> GLUE's
        answers = self._answers(prediction.predictions)
        metrics: dict[str, float] = GlueMetric(self.task.name).compute(predictions=answers, references=references)
        return metrics

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """The task's metrics on its dev set(s)."""
        metrics = {}
        for name, rows in self.dev_data.items():
            measured = trainer.evaluate(rows, metric_key_prefix=name)
            suffix = name.removeprefix("validation") if len(self.dev_data) > 1 else ""  # "_matched" or "_mismatched"
            metrics.update({f"{metric}{suffix}": measured[f"{name}_{metric}"] for metric in self.task.metrics})
        return {"metrics": metrics, "dev_samples": sum(len(rows) for rows in self.dev_data.values())}

    def predict(self, trainer: Trainer) -> dict[str, Any]:
        """Write the test predictions into predictions/; names the files."""
        if not self.test_data:
            return {}
        trainer.args = copy.copy(trainer.args)
        trainer.args.train_sampling_strategy = "random"  # grouping by length, Trainer would reorder these rows as well
        for name, rows in self.test_data.items():
            outputs = trainer.predict(rows).predictions
            if trainer.is_world_process_zero():
                write_predictions(self.output / "predictions" / name, self.task, self._answers(outputs))
        return {"predictions": [f"predictions/{name}" for name in self.test_data]}
