"""Time and peak memory of `convert_checkpoint.py` on a Llama made on the spot, next to a plain copy of its files.

    python recipes/benchmarks/convert_checkpoint.py --gib 6 --repeats 3 --methods mean pca

The model is as wide as Llama 2 7B (4,096; 32 heads, all of them key/value heads; bfloat16 in shards of 2 GiB) and
is never in memory. Copy and conversions run alternately, each conversion in a process of its own, whose start
counts; both wait for the disk. The files are deleted afterwards. `pca+statistics` reads second moments of random
correlated inputs.

What to expect: all bytes are read and written once, so a copy's time is the bound of `mean`, which computes on keys
and values alone. `pca` without statistics adds a Gram matrix and some small products per group, with statistics also
the product of every query, key and value row with an m x m matrix in float64: the table's GFLOP.
"""

from __future__ import annotations

import argparse
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

from hf_attnkit.experiment.benchmarking.checkpoint_files import (
    GIB,
    NUM_HEADS,
    NUM_KEY_VALUE_HEADS,
    copy,
    llama,
    write_model,
    write_statistics,
)
from hf_attnkit.experiment.files import show

METHODS = ("mean", "norm_mean", "first", "procrustes", "pca", "pca+statistics")
COPY = "copy"
# ru_maxrss of a child begins with what its parent held when it was started; VmHWM is the program's own peak.
RUN = """
import sys
from hf_attnkit.conversion import convert_checkpoint
source, target, number, method, *moments = sys.argv[1:]
options = {"statistics": moments[0]} if moments else {}
print(convert_checkpoint(source, target, num_key_value_heads=int(number), method=method, **options))
print(open("/proc/self/status").read())
"""


def convert(source: Path, target: Path, label: str, moments: Path) -> int:
    """Convert in a process of its own; its peak resident set in bytes."""
    method, _, with_statistics = label.partition("+")
    arguments = [str(source), str(target), str(NUM_KEY_VALUE_HEADS), method]
    arguments += [str(moments)] if with_statistics else []
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
    return float(layers * 2 * hidden**2 * columns / 1e9)


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
