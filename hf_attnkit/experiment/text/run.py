"""What a recipe for causal language models needs: arguments, blocks of text, perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import hf_attnkit
from hf_attnkit.experiment.arguments import RunArguments, require_place
from hf_attnkit.experiment.record import Data
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.text.data import DATASET, Blocks, TextArguments, load_text
from hf_attnkit.models.layers import attention_layers


@dataclass
class ModelArguments(RunArguments):
    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the model and its tokenizer."})
    gguf_file: str | None = field(default=None, metadata={"help": "A GGUF file in it, which is dequantized."})


def load_causal_model(path: str, gguf_file: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """A decoder of any checkpoint, with weights that can be changed and saved.

    Raises:
        ValueError: for an encoder.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if gguf_file:
        options["gguf_file"] = gguf_file
    model = hf_attnkit.load_pretrained(path, AutoModelForCausalLM, **options)
    if not all(getattr(layer.module, "is_causal", True) for layer in attention_layers(model)):
        raise ValueError(
            f"{path} ({model.config.model_type}) is an encoder: its tokens see those that they should predict; "
            "this recipe takes decoders, and the recipes for GLUE encoders"
        )
    return model


class LanguageModelRun(Run):
    """A causal language model; measured by its perplexity on held-out blocks.

    Raises:
        ValueError, FileNotFoundError: text that is missing or too short, a model that sees the future, blocks longer
            than its positions, and as `Run`.
    """

    def __init__(
        self, arguments: ModelArguments, text: TextArguments, training: TrainingArguments, *others: Any
    ) -> None:
        super().__init__(arguments, training, text, *others)
        require_place(arguments.model_name_or_path)
        documents = load_text(text)
        self.task_name = "language modelling"
        self.block_size = text.block_size
        located = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, **located)
        self.model = self.load_untouched()
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and self.block_size > positions:
            raise ValueError(f"--block_size {self.block_size} is longer than the model's {positions} positions")
        options = (self.tokenizer, text.block_size)
        self.train_data = Blocks(documents.train, *options, text.max_train_samples, "training")
        self.eval_data = Blocks(documents.validation, *options, text.max_eval_samples, "held-out")
        self.data = Data(
            name=documents.name,
            hub_path=text.dataset_name or "local",
            task_type="text-generation",
            config=text.dataset_config_name,
            train_split="train",
            evaluation_split=documents.split,
            train_examples=len(self.train_data),
            evaluation_examples=len(self.eval_data),
            language="en" if text.dataset_name == DATASET[0] or text.text else None,
            note=f"examples are blocks of {text.block_size:,} tokens",
        )

    def load_model(self, path: str) -> PreTrainedModel:
        """In the precision that it was saved in."""
        return load_causal_model(path, dtype="auto")

    def load_untouched(self) -> PreTrainedModel:
        """The model that the run started from."""
        return load_causal_model(self.arguments.model_name_or_path, self.arguments.gguf_file, self.arguments.dtype)

    def calibration_batches(self, size: int) -> Iterable[Mapping[str, Any]]:
        """Batches of the first training blocks, `size` tokens or up to a block more."""
        blocks = Subset(self.train_data, range(self.calibration_size(size) // self.block_size))
        return DataLoader(blocks, self.training.per_device_eval_batch_size)

    def calibration_size(self, size: int) -> int:
        """How many tokens those batches have: blocks are read whole."""
        return min(math.ceil(size / self.block_size), len(self.train_data)) * self.block_size

    def trainer_options(self) -> dict[str, Any]:
        """Blocks need no padding, and only a number for each leaves the evaluation loop."""
        return {
            "data_collator": default_data_collator,
            "preprocess_logits_for_metrics": negative_log_likelihood,
            "compute_metrics": self._metrics,
        }

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return {"perplexity": math.exp(prediction.predictions.mean() / (self.block_size - 1))}

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """exp of the mean negative log-likelihood in nats of every token of the held-out blocks but their first."""
        perplexity = trainer.evaluate()["eval_perplexity"]
        blocks = len(self.eval_data)
        predicted = blocks * (self.block_size - 1)
        return {"metrics": {"perplexity": perplexity}, "dev_samples": blocks, "predicted_tokens": predicted}


def negative_log_likelihood(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The sum over each block's predicted tokens, in nats, `(batch,)`, float64.

    Args:
        logits: `(batch, block_size, vocabulary)`.
        labels: `(batch, block_size)`.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    # Block by block: log-probabilities of a batch would take as much memory as its logits once more.
    sums = [
        F.cross_entropy(block[:-1].float(), ids[1:], reduction="none").double().sum()
        for block, ids in zip(logits, labels, strict=True)
    ]
    return torch.stack(sums)
