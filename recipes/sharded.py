"""Train sharded over processes (FSDP, Zhao et al. 2023, arXiv 2304.11277) a model that is changed and saved whole.

Sharding replaces a model's parameters in place, and heads cannot be cut out of shards. So a copy is sharded, to
evaluate or to train; after training its weights are gathered into the whole model.
"""

from __future__ import annotations

from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainingArguments


def is_asked_for(training: TrainingArguments) -> bool:
    """Whether `--fsdp` or `accelerate launch --use_fsdp` was given."""
    return bool(training.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def check(trainer: Trainer) -> None:
    """Raise `ValueError` where accelerate would leave the model unsharded without a word."""
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            "FSDP was asked for and accelerate does not shard here: it takes several processes with a GPU each, as "
            "accelerate launch --use_fsdp --num_processes 2 starts them; leave it out to train without"
        )


def gather(sharded: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of a sharded model into the model that it is a copy of, on every process."""
    whole.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
