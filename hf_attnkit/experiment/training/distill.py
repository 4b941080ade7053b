"""Train a changed model towards what it was: logits (Hinton et al. 2015, arXiv 1503.02531) and attention outputs.

With the model before the change as teacher t, the model that trains as student s, weight w, temperature T:

    loss = (1 - w) * task loss  +  w * T^2 * KL(softmax(t / T) || softmax(s / T))  +  a * mean_l |s_l - t_l|^2 / |t_l|^2

The second term is the mean over examples, or over predicted tokens of a causal model; for regression it is the mean
squared difference of the outputs. s_l and t_l are what layer l's attention adds to the residual stream (matched layer
by layer as hidden states are in TinyBERT, Jiao et al. 2020, arXiv 1909.10351), padding left out: 0 is equal, 1 is as
bad as putting out nothing. Where the teacher's layer adds nothing, as one without heads, |s_l|^2 is not divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from hf_attnkit.models.layers import attention_layers
from hf_attnkit.observing.batches import real_tokens

# Numbers of one float32 chunk of log-probabilities: 64 MiB.
CHUNK = 2**24


@dataclass
class DistillationArguments:
    distill: bool = field(default=False, metadata={"help": "Train towards the model as it was before the change."})
    distill_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the teacher's outputs in the loss, 0 to 1; the task has the rest. By default 0.5."
        },
    )
    distill_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Divides both models' logits; above 0, higher gives unlikely classes more weight. By default 2."
        },
    )
    distill_attention_weight: float | None = field(
        default=None, metadata={"help": "Weight of the attention outputs' error in the loss, at least 0. By default 1."}
    )

    def __post_init__(self) -> None:
        defaults = {"distill_weight": 0.5, "distill_temperature": 2.0, "distill_attention_weight": 1.0}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, default)
            elif not self.distill:
                raise ValueError(f"--{name} {value} has no effect without --distill; add it, or leave this out")
        weight, temperature, attention_weight = (getattr(self, name) for name in defaults)
        if not 0 <= weight <= 1:
            raise ValueError(f"--distill_weight {weight} must be from 0 (the task alone) to 1 (the teacher alone)")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"--distill_temperature {temperature} must be a finite number above 0")
        if not (attention_weight >= 0 and math.isfinite(attention_weight)):
            raise ValueError(f"--distill_attention_weight {attention_weight} must be a finite number, at least 0")
        if weight == attention_weight == 0:
            raise ValueError(
                "--distill_weight 0 with --distill_attention_weight 0 leaves nothing of --distill; leave it out"
            )

    def check(self, training: TrainingArguments) -> None:
        """Raise `ValueError` for training arguments under which distillation is not what it says."""
        if not self.distill:
            return
        if not training.do_train:
            raise ValueError("--distill has no effect without training; add --do_train")
        if self.distill_weight == 1 and training.label_smoothing_factor:
            raise ValueError(
                f"--label_smoothing_factor {training.label_smoothing_factor} has no effect with --distill_weight 1, "
                "which leaves the labels out; lower one of them"
            )
        if training.n_gpu > 1:
            raise ValueError(
                f"--distill runs with one process for each GPU, not with one for all {training.n_gpu}; start it with "
                "accelerate launch --multi_gpu"
            )
        if training.torch_compile:
            raise ValueError("--distill looks into the model while it runs, which --torch_compile prevents; leave one")
        reentrant = (training.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if training.gradient_checkpointing and reentrant and self.distill_attention_weight:
            raise ValueError(
                "reentrant checkpoints pass no gradient to the attention outputs; leave use_reentrant out of "
                "--gradient_checkpointing_kwargs, or give --distill_attention_weight 0"
            )


class DistillationTrainer(Trainer):
    """A `Trainer` with the loss above while it trains; it evaluates as `Trainer` does.

    Args:
        teacher: the model before the change, of the same family; made to stay in evaluation mode, without gradients,
            on the student's device. It is neither saved nor wrapped for several processes.
        weight, temperature, attention_weight: w, T and a.
    """

    def __init__(
        self, *args: Any, teacher: PreTrainedModel, weight: float, temperature: float, attention_weight: float,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.teacher.config.use_cache = False
        self.weight, self.temperature, self.attention_weight = weight, temperature, attention_weight
        _require_alike(unwrap_peft_model(self.model), teacher)
        names = {id(module): name for name, module in teacher.named_modules()}
        # A change of heads, and adapters inside a PEFT model, leave the modules' names as they are.
        self.outputs = [names[id(layer.output)] for layer in attention_layers(teacher)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss; with `return_outputs`, the student's outputs too. Normalised over accumulated batches as the
        task's loss is."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = unwrap_peft_model(self.accelerator.unwrap_model(model))
        with _seen(student, self.outputs) as found:
            # A copy: label smoothing takes the labels out.
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self.accelerator.autocast(), _seen(self.teacher, self.outputs) as targets:
            target = self.teacher(**unlabelled).logits

        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if self.weight:
            total, count = divergence(outputs["logits"], target, inputs["labels"], self.temperature)
            if scaled and num_items_in_batch is not None:
                # As Trainer: a sum over all accumulated batches of all processes, which DDP then averages.
                shared = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                term = total * shared / num_items_in_batch
            else:
                term = total / max(count, 1)
            loss = (1 - self.weight) * loss + self.weight * term
        if self.attention_weight:
            errors = [relative_error(found[name], targets[name], inputs) for name in self.outputs]
            error = torch.stack(errors).mean()
            # The error of a batch is a ratio, so batches count alike, whatever their tokens.
            loss = loss + self.attention_weight * error / (self.current_gradient_accumulation_steps if scaled else 1)
        return (loss, outputs) if return_outputs else loss


def _require_alike(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `ValueError` for a teacher whose outputs are not compared with the student's one by one."""
    configs = [model.config.get_text_config() for model in (student, teacher)]
    for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_labels"):
        own, other = (getattr(config, name, None) for config in configs)
        if own != other:
            raise ValueError(
                f"the teacher has {name} {other} and the model that trains {own}: a teacher is the same model before "
                "its change"
            )


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, int]:
    """The sum of T^2 * KL over examples or predicted tokens, and how many they are.

    Args:
        student, teacher: logits `(batch, classes)`, one class for regression; or `(batch, tokens, vocabulary)` of a
            causal model, where token i predicts label i + 1.
        labels: `(batch,)`, or `(batch, tokens)` with -100 where nothing is to be predicted.
    """
    if student.dim() == 3:
        student, teacher, labels = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if student.shape[-1] == 1:
        difference = _wide(student) - _wide(teacher)
        return difference.square().sum(), len(difference)
    counted = labels != -100
    rows = max(CHUNK // student.shape[-1], 1)
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for parts in zip(student.split(rows), teacher.split(rows), counted.split(rows), strict=True):
        # Log-probabilities of a large vocabulary are made again in the backward pass, chunk by chunk.
        total = total + checkpoint(_divergence, *parts, temperature, use_reentrant=False, preserve_rng_state=False)
    return total, int(counted.sum())


def _divergence(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    student, teacher = (F.log_softmax(_wide(logits) / temperature, dim=-1) for logits in (student, teacher))
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * each.masked_fill(~counted, 0.0).sum()


def relative_error(student: Tensor, teacher: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Mean squared difference of `(batch, tokens, features)` over real tokens, divided by the teacher's mean square.

    Where that is 0 it is not divided.
    """
    student, teacher = (_wide(real_tokens(x, inputs)) for x in (student, teacher))
    energy = teacher.square().mean()
    return (student - teacher).square().mean() / energy.where(energy > 0, 1.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _seen(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules put out in one forward pass, by name. A pass that checkpoints repeat later is not seen."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = output

        return after

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
