"""What finding a model's heads and proving a change to it costs, next to forward passes of the same model.

A round makes each change once to a twin of the model that shares its weights, and runs 20 forward passes of 16 tokens;
each round begins with another.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_attnkit
from hf_attnkit.analysis.trials import silent, twin
from hf_attnkit.experiment.benchmarking.measure import finish, peak_bytes, quartiles
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.layers import attention_layers
from hf_attnkit.models.ownership import ownerships

PASSES, TOKENS = 20, 16
FORWARD = f"{PASSES} forward passes of {TOKENS} tokens"
# Made on the spot: 1.1 billion parameters, as TinyLlama.
SYNTHETIC = "llama-1b"


def make_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or hub name, or `SYNTHETIC`, in evaluation mode."""
    if name != SYNTHETIC:
        gguf = [path.name for path in Path(name).glob("*.gguf")]  # which is dequantized
        options = {"gguf_file": gguf[0], "auto_class": AutoModelForCausalLM} if gguf else {}
        model: PreTrainedModel = hf_attnkit.load_pretrained(name, dtype=dtype, **options)
        return model.eval()
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config).eval()


def calls(model: PreTrainedModel) -> dict[str, Callable[[PreTrainedModel], object]]:
    """What is measured, by name; each takes a twin of the model.

    Changes are made in all layers: a group of heads removed, half as many key/value heads.
    """
    layers = attention_layers(model)
    groups = {layer.index: list(range(layer.num_heads // layer.num_key_value_heads)) for layer in layers}
    ids = torch.arange(3, 3 + TOKENS)[None].to(model.device)
    found = discover(model)

    @torch.no_grad()
    def forward(each: PreTrainedModel) -> None:
        for _ in range(PASSES):
            each(input_ids=ids)

    half = layers[0].num_key_value_heads // 2
    return {
        FORWARD: forward,
        "discovery": discover,
        "what belongs to a head": lambda each: ownerships(each, found.attentions),
        "swap to flash": lambda each: hf_attnkit.swap_attention(each, "flash"),
        "pruning": lambda each: hf_attnkit.prune_heads(each, groups),
        "conversion (mean)": lambda each: hf_attnkit.convert_to_gqa(each, half, method="mean"),
    }


def measure_changes(
    model: PreTrainedModel, repeats: int, step: Callable[[str], object] = lambda label: None
) -> list[dict[str, Any]]:
    """A row for each of `calls`: seconds of each round, and the peak memory next to the model's own.

    Args:
        step: called with the label before each sample: `repeats + 2` times a label.
    """
    todo = calls(model)
    labels = list(todo)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    with silent():
        for label in labels:  # fills allocators
            step(label)
            todo[label](twin(model))
        for repeat in range(repeats):
            first = repeat % len(labels)
            for label in labels[first:] + labels[:first]:
                step(label)
                seconds[label].append(_timed(todo[label], twin(model)))
        peaks = {}
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        for label in labels:
            step(label)
            # Of a copy made within what is measured: a twin's old weights would stay with the model.
            peaks[label] = max(0, peak_bytes(functools.partial(_on_a_copy, todo[label], model), model.device) - size)
    return [{"what": label, "seconds": seconds[label], "peak_bytes": peaks[label]} for label in labels]


def _on_a_copy(call: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> None:
    call(copy.deepcopy(model))


def _timed(call: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> float:
    finish(model.device)
    start = time.perf_counter()
    call(model)
    finish(model.device)
    return time.perf_counter() - start


def layer_bytes(model: PreTrainedModel) -> int:
    """Gradients of one layer, in float32: of its attention, the largest of the model's."""
    sizes = [sum(p.numel() for p in layer.block.parameters()) for layer in attention_layers(model)]
    return 4 * max(sizes)


def ratios(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Of each row's time to that of the forward passes of its round: lower quartile, median, upper quartile."""
    base: Mapping[str, Any] = next(row for row in rows if row["what"] == FORWARD)
    return {
        row["what"]: quartiles([a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]) for row in rows
    }
