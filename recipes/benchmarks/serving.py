"""Latency and throughput where a model is used: untouched and changed, in PyTorch and in ONNX Runtime, alternately.

    python recipes/benchmarks/serving.py --model_name_or_path outputs/cola --changed outputs/cola-pruned \\
        --sides pytorch compiled onnx onnx-int8 --batch_sizes 1 32 --length 64 --threads 2 --repeats 31

A sample of an encoder is one forward pass of `--length` tokens, one of a decoder `--new_tokens` greedy tokens behind a
prompt of `--length`. Each ONNX file is exported here and compared with its model first. All sides of a batch size run
alternately in one process, on `--threads` threads; ONNX Runtime's sleep while they wait, so that they take nothing from
PyTorch's. Reported: median milliseconds and quartiles, sequences (of a decoder, tokens) per second, the ratio of
medians to the untouched model in PyTorch, and megabytes: of the weights or the file, and of a decoder's cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import cache_bytes_per_token, load_pretrained
from hf_attnkit.experiment.benchmarking.measure import quartiles, time_alternately
from hf_attnkit.experiment.exporting import session_options
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.export import export_onnx
from hf_attnkit.export.generation import generate
from hf_attnkit.export.inputs import input_names, make_inputs

SIDES = ("pytorch", "compiled", "onnx", "onnx-int8")


def side(
    model: PreTrainedModel, name: str, place: Path, new_tokens: int
) -> tuple[Callable[[dict[str, Tensor]], object], int]:
    """What runs a model on inputs, and the bytes of its weights or its file."""
    decodes = model.can_generate()
    if name.startswith("onnx"):
        from transformers.exporters import ExportedModel

        precision = "int8" if name == "onnx-int8" else "float32"
        size = export_onnx(model, place, precision=precision).num_bytes
        options = session_options(torch.get_num_threads())
        file: Any = ExportedModel.from_pretrained(place, local_files_only=True, device="cpu", session_options=options)
        if decodes:
            return lambda given: generate(file, given["input_ids"], given["attention_mask"], new_tokens), size
        return lambda given: file(**given), size
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    forward: Any = torch.compile(model, dynamic=True) if name == "compiled" else model
    run = (lambda given: model.generate(**given, **options)) if decodes else (lambda given: forward(**given))
    return run, sum(parameter.nbytes for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub name of the untouched model")
    parser.add_argument("--changed", help="folder of the changed one; any that load_pretrained reads")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="where each model runs")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--length", type=int, default=64, help="tokens of an input, or of a prompt")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that a decoder generates in a sample")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch and of ONNX Runtime")
    parser.add_argument("--repeats", type=int, default=31, help="samples of each side")
    parser.add_argument("--output_file", type=Path, help="JSON of all measurements")
    arguments = parser.parse_args()
    if min(*arguments.batch_sizes, arguments.length, arguments.new_tokens, arguments.threads, arguments.repeats) < 1:
        parser.error("--batch_sizes, --length, --new_tokens, --threads and --repeats must be at least 1")
    torch.set_num_threads(arguments.threads)
    paths = {"untouched": arguments.model_name_or_path, "changed": arguments.changed}
    models = {name: load_pretrained(path, dtype="float32").eval() for name, path in paths.items() if path is not None}
    if models["untouched"].can_generate() and "compiled" in arguments.sides:
        parser.error("a decoder's generate() is not compiled here: leave 'compiled' out of --sides")
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs = {
            (name, where): side(model, where, Path(folder) / f"{name}-{where}", arguments.new_tokens)
            for name, model in models.items()
            for where in arguments.sides
        }
        for batch in arguments.batch_sizes:
            inputs = sample(models["untouched"], batch, arguments.length)
            calls = {f"{name}, {where}": partial(run, inputs) for (name, where), (run, _) in runs.items()}
            seconds = time_alternately(calls, arguments.repeats, torch.device("cpu"))
            for (name, where), (_, size) in runs.items():
                rows.append(
                    {"batch_size": batch, "model": name, "runtime": where, "bytes": size,
                     "cache_bytes_per_token": cached(models[name]), "seconds": seconds[f"{name}, {where}"]}
                )  # fmt: skip
    print_rows(rows, arguments, models["untouched"].can_generate())
    if arguments.output_file:
        write_json(arguments.output_file, {"arguments": vars(arguments) | {"output_file": None}, "rows": rows})


def sample(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs with padded rows, for a decoder on the left."""
    inputs = make_inputs(model, input_names(model, None), batch, length)
    return {name: each.flip(1) for name, each in inputs.items()} if model.can_generate() else inputs


def cached(model: PreTrainedModel) -> int | None:
    """Bytes of a decoder's cache per token."""
    return cache_bytes_per_token(model) if model.can_generate() else None


def print_rows(rows: list[dict[str, Any]], arguments: argparse.Namespace, decodes: bool) -> None:
    """One row for each batch size, model and runtime; ratios are to the first of the batch size."""
    what = f"{arguments.new_tokens} tokens behind {arguments.length}" if decodes else f"{arguments.length} tokens"
    table = Table(title=f"serving, {what}, {arguments.threads} threads, medians and quartiles")
    for name in ("batch", "model", "runtime", "ms", "quartiles", f"{'tokens' if decodes else 'sequences'}/s", "ratio",
                 "MB", "cache, bytes/token"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "runtime") else "right")
    first: dict[int, float] = {}
    for row in rows:
        lower, median, upper = quartiles(row["seconds"])
        base = first.setdefault(row["batch_size"], median)
        rate = row["batch_size"] * (arguments.new_tokens if decodes else 1) / median
        table.add_row(str(row["batch_size"]), row["model"], row["runtime"], f"{1e3 * median:.2f}",
                      f"{1e3 * lower:.2f} to {1e3 * upper:.2f}", f"{rate:,.1f}", f"{median / base:.3f}",
                      f"{row['bytes'] / 1e6:.1f}", str(row["cache_bytes_per_token"] or ""))  # fmt: skip
    show(table)


if __name__ == "__main__":
    main()
