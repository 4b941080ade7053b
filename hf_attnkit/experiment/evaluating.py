"""Measure a model: the task's metrics, what the model consists of, and what it cost to get there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_attnkit.analysis.entropy_callback import core_model
from hf_attnkit.attention.cache_bytes import bytes_of_layers
from hf_attnkit.attention.swap import saved_kind
from hf_attnkit.experiment.costs import Laps
from hf_attnkit.models.layers import attention_layers


def measure_stage(trainer: Trainer, measure: Callable[[Trainer], dict[str, Any]], laps: Laps) -> dict[str, Any]:
    """What a stage of results.json holds except for its name.

    Args:
        measure: evaluates; `{"metrics": {name: value}}` and how much data that was.
        laps: its last lap ended with the stage before, so that the work since then is this stage's.
    """
    work_seconds, work_memory = laps.lap()
    measured = measure(trainer)
    seconds, memory = laps.lap()
    costs = {"work_seconds": round(work_seconds, 2), "evaluation_seconds": round(seconds, 2), **memory}
    if work_memory:
        costs["work_peak_memory_bytes"] = work_memory["peak_memory_bytes"]
    # accelerate marks a model that it prepared, for evaluation too, and takes it as it is from then on: training
    # after an evaluation would run without gradients shared among processes. Its forward is wrapped for autocast.
    for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
        vars(trainer.model).pop(name, None)
    return {"metrics": measured.pop("metrics"), **describe(core_model(trainer.model)), **costs, **measured}


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a model consists of: its parameters, and of each layer the heads and the attention.

    `key_value_bytes_per_token`, as `cache_bytes_per_token`, is `None` for an encoder, which keeps no keys and values.
    """
    layers = attention_layers(model, adapters=True)
    is_decoder = all(getattr(layer.module, "is_causal", True) for layer in layers)
    return {
        "parameters": model.num_parameters(),  # unlike numel(), of numbers that are packed into bytes too
        "num_heads": [len(layer.heads) for layer in layers],
        "num_key_value_heads": [layer.num_key_value_heads for layer in layers],
        "key_value_bytes_per_token": bytes_of_layers(layers, model.dtype) if is_decoder else None,
        "attention": [saved_kind(model, layer.index) for layer in layers],
    }


def signature(stage: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the time of a forward pass; equal for stages that differ in their weights alone."""
    return tuple(str(stage[name]) for name in ("parameters", "num_heads", "num_key_value_heads", "attention"))
