"""Train sharded over processes (FSDP, Zhao et al. 2023, arXiv 2304.11277) a model that is changed and saved whole.

Sharding replaces a model's parameters in place, and heads cannot be cut out of shards. So a copy is sharded to train,
which is what takes the memory (gradients and the optimizer's state), and its weights are gathered into the model.
"""

from __future__ import annotations

from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainingArguments

from hf_attnkit.analysis.entropy_callback import core_model
from hf_attnkit.models.layers import attention_layers


def is_asked_for(training: TrainingArguments) -> bool:
    """Whether `--fsdp` or `accelerate launch --use_fsdp` was given."""
    return bool(training.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def keep_whole(trainer: Trainer) -> None:
    """Let a trainer evaluate and save its model as it is, whole in every process.

    Raises:
        ValueError: where accelerate would not have sharded it either, without a word; and for FSDP1, which flattens
            parameters and renames modules.
    """
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            "FSDP was asked for and accelerate does not shard here: it takes several processes with a GPU each, as "
            "accelerate launch --use_fsdp --num_processes 2 starts them; leave it out to train without"
        )
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported; give accelerate launch --fsdp_version 2, or --fsdp without a version")
    trainer.is_fsdp_enabled = False


def shard(trainer: Trainer) -> None:
    """Let a trainer that keeps its model whole shard it when it trains, layer by layer."""
    trainer.is_fsdp_enabled = True
    plugin = trainer.accelerator.state.fsdp_plugin
    # Found now, since a sharded model does not run alone.
    layers = attention_layers(core_model(trainer.model), adapters=True)
    if plugin.transformer_cls_names_to_wrap is None:
        # BERT's own list of what to shard holds its embeddings, whose tables accelerate then shards a second time.
        plugin.transformer_cls_names_to_wrap = sorted({type(layer.block).__name__ for layer in layers})


def gather(sharded: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of a sharded model into the model that it is a copy of, on every process."""
    whole.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
