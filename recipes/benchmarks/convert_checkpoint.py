"""Time and peak memory of `convert_checkpoint.py` on a Llama made on the spot, beside a plain copy of its files.

    python recipes/benchmarks/convert_checkpoint.py --gib 6 --repeats 3 --methods mean pca

The model is as wide as Llama 2 7B (4,096; 32 heads, all of them key/value heads; bfloat16 in shards of 2 GiB) and
is never in memory. Copy and conversions run in turns, each conversion in a process of its own, whose start
counts; both wait for the disk. The files are deleted afterwards. `pca+statistics` reads second moments of random
correlated inputs.

What to expect: all bytes are read and written once, so a copy's time is the bound of `mean`, which computes on keys
and values alone. `pca` without statistics adds a Gram matrix and some small products per group, with statistics also
the product of every query, key and value row with an m x m matrix in float64: the table's GFLOP.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig

from hf_attnkit.conversion.checkpoints.safetensors_stream import CHUNK, Entry, Writer
from hf_attnkit.experiment.files import show, write_json

GIB = 2**30
METHODS = ("mean", "norm_mean", "first", "procrustes", "pca", "pca+statistics")
NUM_HEADS, NUM_KEY_VALUE_HEADS = 32, 8
COPY = "copy"
# ru_maxrss of a child begins with what its parent held when it was started; VmHWM is the program's own peak.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
print(open("/proc/self/status").read())
"""


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


def convert(source: Path, target: Path, label: str, moments: Path) -> int:
    """Run the recipe; its peak resident set in bytes."""
    method, _, with_statistics = label.partition("+")
    arguments = [str(Path(__file__).parents[1] / "convert_checkpoint.py"), str(source), str(target)]
    arguments += ["--num_key_value_heads", str(NUM_KEY_VALUE_HEADS), "--method", method]
    arguments += ["--statistics", str(moments)] if with_statistics else []
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024


def gflop(label: str, config: LlamaConfig) -> float:
    """Float64 operations of the large products, 1e9."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    group, head = NUM_HEADS // NUM_KEY_VALUE_HEADS, hidden // NUM_HEADS
    # Values: a group's Gram matrix; each head's metric and root, the shared value, and the new output projections.
    columns = (group + 4) * head if label.startswith("pca") else 0
    # Queries, keys and values times the moment.
    columns += 3 * hidden if label == "pca+statistics" else 0
    return layers * 2 * hidden**2 * columns / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=6, help="least size of the model's files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["mean", "pca"])
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    arguments = parser.parse_args()
    config, entries = llama(arguments.gib, arguments.hidden_size, arguments.vocab_size)
    size = sum(entry.nbytes for entry in entries.values())
    free = shutil.disk_usage(arguments.folder).free
    if free < 2.5 * size:
        parser.error(f"{arguments.folder} has {free / GIB:.1f} GiB free, {2.5 * size / GIB:.1f} are needed")
    seconds: dict[str, list[float]] = {label: [] for label in (COPY, *arguments.methods)}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, target, moments = Path(name) / "in", Path(name) / "out", Path(name) / "statistics.safetensors"
        source.mkdir()
        write_model(source, config, entries)
        if "pca+statistics" in arguments.methods:
            write_statistics(moments, config)
        for repeat in range(arguments.repeats):
            labels = list(seconds)
            for label in labels[repeat % len(labels) :] + labels[: repeat % len(labels)]:
                start = time.perf_counter()
                if label == COPY:
                    copy(source, target)
                else:
                    peaks[label] = max(convert(source, target, label, moments), peaks.get(label, 0))
                seconds[label].append(time.perf_counter() - start)
                peak = f", peak {peaks[label] / 2**20:,.0f} MiB" if label in peaks else ""
                print(f"{label}: {seconds[label][-1]:.1f} s{peak}", flush=True)
                shutil.rmtree(target)
    bound = max(entry.nbytes for entry in entries.values()) + GIB
    title = f"Llama, {size / GIB:.1f} GiB, {config.num_hidden_layers} layers of {config.hidden_size}, {NUM_HEADS} -> "
    title += f"{NUM_KEY_VALUE_HEADS} key/value heads; {torch.get_num_threads()} threads, {arguments.repeats} repeats"
    table = Table("method", "peak memory, MiB", "bound, MiB", "seconds", "of a copy", "GFLOP", title=title)
    medians = {label: statistics.median(found) for label, found in seconds.items()}
    for label, median in medians.items():
        peak = f"{peaks[label] / 2**20:,.0f}" if label in peaks else ""
        table.add_row(
            label, peak, f"{bound / 2**20:,.0f}" if peak else "", f"{median:.1f}",
            f"{median / medians[COPY]:.2f}", f"{gflop(label, config):,.0f}" if peak else "",
        )  # fmt: skip
    show(table)


if __name__ == "__main__":
    main()
