"""The files of a large model made on the spot, and a plain copy of them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import LlamaConfig

from hf_attnkit.conversion.checkpoints.safetensors_stream import CHUNK, Entry, Writer
from hf_attnkit.experiment.files import write_json

GIB = 2**30
NUM_HEADS, NUM_KEY_VALUE_HEADS = 32, 8


def llama(gib: float, hidden: int, vocabulary: int) -> tuple[LlamaConfig, dict[str, Entry]]:
    """The config and tensors of a model of at least so many GiB."""
    wide = hidden * 43 // 16
    layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, wide),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "koqv"},
    }
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes["model.embed_tokens.weight"] = (vocabulary, hidden)
    number = 0
    while 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) < gib * GIB:
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        number += 1
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=number,
        num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_HEADS, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    return config, {name: Entry("BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()}


def write_model(folder: Path, config: LlamaConfig, entries: dict[str, Entry]) -> None:
    """Random weights, some rows at a time."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if sum(e.nbytes for e in shards[-1].values()) + entry.nbytes > 2 * GIB:
            shards.append({})
        shards[-1][name] = entry
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    generator = torch.Generator().manual_seed(0)
    for file, shard in zip(names, shards, strict=True):
        with Writer(folder / file, dict(sorted(shard.items())), {"format": "pt"}) as writer:
            for name, entry in shard.items():
                for first in range(0, entry.shape[0], 1024):
                    shape = (min(1024, entry.shape[0] - first), *entry.shape[1:])
                    writer.rows(name, torch.randn(shape, generator=generator, dtype=torch.bfloat16) / 50, first)
    weights = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(entry.nbytes for entry in entries.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weights})
    config.save_pretrained(folder)


def write_statistics(path: Path, config: LlamaConfig) -> None:
    """The second moment of 8,192 random correlated inputs, the same for each layer."""
    hidden = config.hidden_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8192, hidden, generator=generator) * torch.linspace(0.1, 2, hidden)
    x = torch.cat([x + x.roll(1, 1), torch.ones(8192, 1)], dim=1)
    moment = x.T @ x / 8192
    entry = Entry("F32", (hidden + 1, hidden + 1), moment.nbytes)
    names = [f"layers.{i}.second_moment" for i in range(config.num_hidden_layers)]
    with Writer(path, dict.fromkeys(names, entry), {"num_tokens": "8192"}) as writer:
        for name in names:
            writer.rows(name, moment)


def copy(source: Path, target: Path) -> None:
    """Every file, read and written in the chunks of the conversion, and onto the disk."""
    target.mkdir()
    buffer = memoryview(bytearray(CHUNK))
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as old, open(target / path.name, "wb", buffering=0) as new:
            while count := old.readinto(buffer):
                new.write(buffer[:count])
            os.fsync(new.fileno())
