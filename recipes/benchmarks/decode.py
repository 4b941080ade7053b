"""Decode speed and cache size before and after conversions to fewer key/value heads, all models timed alternately.

    python recipes/benchmarks/decode.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --num_key_value_heads 1 \\
        --lengths 1024 2048 4096 8192 --repeats 9

A sample is one decode step of the whole model, batch size 1, behind a `DynamicCache` that already holds
so many tokens; the cache is filled with noise, since values do not change the time. Reported: median tokens per second
and quartiles, the ratio of medians to the untouched model, and the bytes that the real cache holds. Stock attention
is SDPA; `+ gqa` swaps in this package's grouped attention, which never repeats keys and values.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

import hf_attnkit
from hf_attnkit.experiment.benchmarking.measure import quartiles, time_alternately
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.text.run import load_causal_model
from hf_attnkit.models.layers import attention_layers


def filled_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """A cache of `length` tokens of noise, of the shapes that the model's layers keep."""
    cache = DynamicCache(config=model.config)
    for layer in attention_layers(model):
        shape = (1, layer.num_key_value_heads, length, layer.head_dim)
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer.index)
    return cache


def held_bytes(cache: DynamicCache) -> int:
    """What the tensors of a cache take."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def decode_step(model: PreTrainedModel, cache: DynamicCache) -> Callable[[], object]:
    """One token through the model behind the cached ones; the cache is cut back, so that steps are alike."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub name of a causal model")
    parser.add_argument("--gguf_file", help="a GGUF file in it, which is dequantized")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--num_key_value_heads", type=int, nargs="+", required=True, help="numbers to convert to")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="cached tokens")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each model and length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, help="JSON of all measurements")
    arguments = parser.parse_args()
    if min(*arguments.lengths, arguments.repeats) < 1:
        parser.error("--lengths and --repeats must be at least 1")

    original = load_causal_model(arguments.model_name_or_path, arguments.gguf_file, dtype=arguments.dtype)
    original = original.eval().to(arguments.device)
    before = attention_layers(original)[0].num_key_value_heads
    models = {f"{before} key/value heads": original}
    for number in arguments.num_key_value_heads:
        converted = hf_attnkit.convert_to_gqa(copy.deepcopy(original), number)  # the method does not change the time
        models[f"{number} key/value heads"] = converted
    for name, model in list(models.items()):
        models[f"{name} + gqa"] = hf_attnkit.swap_attention(copy.deepcopy(model), "gqa")

    rows = []
    with tqdm(
        total=len(arguments.lengths) * len(models) * (arguments.repeats + 1), desc="decode", unit="sample"
    ) as bar:
        for length in arguments.lengths:
            caches = {name: filled_cache(model, length) for name, model in models.items()}
            steps = {name: decode_step(model, caches[name]) for name, model in models.items()}
            times = time_alternately(steps, arguments.repeats, original.device, lambda label: bar.update())
            for name, seconds in times.items():
                rows.append({"length": length, "model": name, "seconds": seconds,
                             "cache_bytes": held_bytes(caches[name])})  # fmt: skip
    print_rows(rows, f"{Path(arguments.model_name_or_path).name}, {arguments.dtype}, {_machine(original.device)}")
    if arguments.output_file:
        write_json(arguments.output_file, {"arguments": vars(arguments) | {"output_file": None}, "rows": rows})


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """One row for each length and model; ratios are to the first model of the length."""
    table = Table(title=f"decode, batch size 1: {title}")
    table.add_column("cached tokens", justify="right")
    table.add_column("model")
    for name in ("tokens per second", "quartiles", "times as fast", "cache, MiB"):
        table.add_column(name, justify="right")
    first: dict[int, float] = {}
    for row in rows:
        slow, median, fast = (1 / value for value in reversed(quartiles(row["seconds"])))
        base = first.setdefault(row["length"], median)
        table.add_row(f"{row['length']:,}", row["model"], f"{median:.2f}", f"{slow:.2f} to {fast:.2f}",
                      f"{median / base:.2f}", f"{row['cache_bytes'] / 2**20:.1f}")  # fmt: skip
    show(table)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"


if __name__ == "__main__":
    main()
