"""Train low-rank adapters of the attention projections (LoRA, Hu et al. 2021, arXiv 2106.09685) and merge them.

A projection W trains as W + (alpha / r) B A with A (r, in) and B (out, r); a classification head trains as a whole.
What is saved and evaluated afterwards has no adapters, unless the base is quantized: that one keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import logging

from hf_attnkit.experiment.record import Change
from hf_attnkit.models.layers import attention_layers, projected_layers

if TYPE_CHECKING:
    from hf_attnkit.experiment.run import Run

logger = logging.get_logger(__name__)


@dataclass
class LoraArguments:
    lora: bool = field(default=False, metadata={"help": "Train adapters of the attention projections, then merge."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapters. By default 16."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapters' scale is alpha / r. By default 32."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the adapters' inputs. By default 0."}
    )

    def __post_init__(self) -> None:
        for name, default in {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}.items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, default)
            elif not self.lora:
                raise ValueError(f"--{name} {value} has no effect without --lora; add it, or leave this out")
        rank, alpha, dropout = self.numbers()
        if rank < 1:
            raise ValueError(f"--lora_r {rank} must be at least 1")
        if not alpha > 0:
            raise ValueError(f"--lora_alpha {alpha} must be above 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"--lora_dropout {dropout} must be from 0 to below 1")

    def numbers(self) -> tuple[int, float, float]:
        """Rank, alpha and dropout."""
        return cast(int, self.lora_r), cast(float, self.lora_alpha), cast(float, self.lora_dropout)

    def check(self, training: TrainingArguments) -> None:
        """Raise `ValueError` if nothing is trained."""
        if self.lora and not training.do_train:
            raise ValueError("--lora has no effect without training; add --do_train")


def train_adapters(run: Run, arguments: LoraArguments, *, merge: bool = True, **options: Any) -> dict[str, Any]:
    """Train adapters of the run's model; returns what `Run.train` returns and the number of trained parameters.

    Args:
        merge: add them to the weights afterwards; a quantized base keeps them as adapters.
        options: those of `Run.train`.
    """
    set_seed(run.training.seed)
    if not merge:
        training = run.training
        run.model = prepare_model_for_kbit_training(
            run.model, training.gradient_checkpointing, training.gradient_checkpointing_kwargs
        )
    run.model = add_adapters(run.model, arguments, is_quantized=not merge)
    trainable = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    if run.done is None:
        run.done = Change(
            "adapters", f"fine-tuned with adapters of rank {arguments.lora_r}", {"rank": arguments.lora_r}
        )
    trained = run.train(**options)
    if not trained:  # over in a resumed run, which takes its model from the change that followed
        run.model = run.model.unload().requires_grad_(True)
        return {}
    if merge:
        run.model = merge_adapters(run.model)
    else:
        require_moved(run.model)
    return trained | {"trained_parameters": trainable}


def add_adapters(model: PreTrainedModel, arguments: LoraArguments, *, is_quantized: bool = False) -> PeftModel:
    """Adapters of every attention projection; only they and a classification head train then.

    The same model with the same parameters, some of them inside new modules. A warning says which projections cannot be
    told, and so get no adapters.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if is_quantized:  # quantized weights have no gradients, which tell what is query, key and value
        parts = [part for layer in attention_layers(model) for part in (*layer.module.modules(), layer.output)]
        linears = [part for part in parts if isinstance(part, nn.Linear)]
    else:
        layers = projected_layers(model)
        found = [each for layer in layers for each in (layer.query, layer.key, layer.value, layer.output)]
        linears = [each for each in found if each is not None]
        unknown = dict.fromkeys(f"{role} ({why})" for layer in layers for role, why in layer.problems.items())
        if linears and unknown:
            logger.warning(f"--lora: no adapters of projections that cannot be told: {'; '.join(unknown)}")
    projections = [names[id(linear)] for linear in dict.fromkeys(linears)]  # fused ones are the same
    if not projections:
        raise ValueError(
            f"--lora: the attention projections of {type(model).__name__} cannot be told"
            + (" from quantized weights" if is_quantized else "")
        )
    vocabulary = model.get_output_embeddings()
    heads = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and vocabulary not in module.modules() and list(module.parameters())
    ]
    rank, alpha, dropout = arguments.numbers()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, and takes any number
        lora_dropout=dropout,
        target_modules=projections,
        modules_to_save=heads or None,
    )
    return get_peft_model(model, config)


def require_moved(wrapped: PeftModel) -> None:
    """Raise `RuntimeError` if training did not move the adapters."""
    moved = [parameter.detach().any() for name, parameter in wrapped.named_parameters() if ".lora_B." in name]
    if not any(moved):
        raise RuntimeError(
            "the adapters are as they were before training, so --lora had no effect; give a higher --learning_rate or "
            "more steps"
        )


def merge_adapters(wrapped: PeftModel) -> PreTrainedModel:
    """The model with the adapters added to its weights, and none left.

    Raises:
        RuntimeError: if training did not move them.
        ValueError: if the merged projections are not plain ones of the sizes that the config says.
    """
    require_moved(wrapped)
    model = wrapped.merge_and_unload()
    projected_layers(model)
    model.requires_grad_(True)
    return model
