"""What a recipe costs over a plain `Trainer`: the same BERT, data and arguments, trained by each alternately.

    OMP_NUM_THREADS=1 python recipes/benchmarks/overhead.py --output_file outputs/overhead.json
    OMP_NUM_THREADS=1 python recipes/benchmarks/overhead.py --changes --model_name_or_path MODEL

A turn trains 101 steps from the same weights: by `transformers.Trainer` itself, by `Run.train` without entropies,
and by `Run.train` as it is by default; a round is one turn of each, and each round begins with another. Reported: the
median step and its quartiles, the ratio of medians to the plain trainer and the quartiles of the rounds' ratios; and
apart, what one measurement of `AttentionEntropyCallback` takes and, at its default interval of 100 steps, which share
of a step that is. The first step of a turn is not counted: it fills allocators, and the callback's first measurement
comes with it, which is one a run and not one in 100 steps.

With `--changes` it measures instead what finding the heads of a model and proving a change to it takes, next to 20
forward passes of 16 tokens, alternately: median seconds, the ratio with the quartiles of the rounds' ratios, and the
peak memory next to the model. The model `llama-1b` is a Llama of 1.1 billion parameters made on the spot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import TrainingArguments

from hf_attnkit.experiment.arguments import ENTROPY_EVERY_N_STEPS
from hf_attnkit.experiment.benchmarking.overhead import DEFAULT, PLAIN, STEPS, WITHOUT, Sentences, summary, turn
from hf_attnkit.experiment.benchmarking.proving import (
    PASSES,
    SYNTHETIC,
    layer_bytes,
    make_model,
    measure_changes,
    ratios,
)
from hf_attnkit.experiment.costs import machine
from hf_attnkit.experiment.files import show, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="rounds; each trains both models")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a model in a round")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--output_file", type=Path, help="JSON of all measurements")
    parser.add_argument("--changes", action="store_true", help="measure changes of a model instead")
    parser.add_argument("--model_name_or_path", default=SYNTHETIC, help="of --changes")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of --changes")
    parser.add_argument("--dtype", default="float32", help="of the weights, of --changes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of --changes")
    options = parser.parse_args()
    if options.changes:
        return changes(options)
    if options.rounds < 1 or options.steps < STEPS:
        parser.error(f"--rounds must be at least 1, and --steps at least {STEPS}, in which one measurement is counted")

    shape = {
        "hidden_size": options.hidden_size, "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
    }  # fmt: skip
    data = Sentences(options.batch_size * options.steps, options.length)
    kinds = [PLAIN, WITHOUT, DEFAULT]
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    measurements: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder, per_device_train_batch_size=options.batch_size, max_steps=options.steps, report_to="none",
            save_strategy="no", disable_tqdm=True, do_train=True, logging_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        for number in range(options.rounds):
            first = number % len(kinds)
            for kind in kinds[first:] + kinds[:first]:
                found[kind].append(turn(kind, training, data, shape, measurements))
        where = machine(training)
    report = summary(found, measurements)
    print_summary(report, f"{where}, torch {torch.__version__}, {options.batch_size} x {options.length} tokens a step")
    if options.output_file:
        arguments = {name: value for name, value in vars(options).items() if name != "output_file"}
        write_json(options.output_file, {"arguments": arguments, "device": where, **report, "seconds": found})
    else:
        print(json.dumps(report))


def changes(options: argparse.Namespace) -> None:
    """What changes of a model cost, as a table."""
    model = make_model(options.model_name_or_path, getattr(torch, options.dtype)).to(options.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    rows, layer = measure_changes(model, options.repeats), layer_bytes(model)
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{threads} threads"
    title = f"{Path(options.model_name_or_path).name}: {size / 1e6:,.0f} M parameters, {options.dtype}, "
    table = Table("", "seconds", f"of {PASSES} passes", "quartiles", "peak, MiB", title=f"{title}{where}")
    for row, (low, ratio, high) in zip(rows, ratios(rows).values(), strict=True):
        table.add_row(row["what"], f"{statistics.median(row['seconds']):.3g}", f"{ratio:.2f}",
                      f"{low:.2f} to {high:.2f}", f"{row['peak_bytes'] / 2**20:,.0f}")  # fmt: skip
    show(table)
    print(f"gradients of one layer: {layer / 2**20:,.0f} MiB")
    if options.output_file:
        found = {"parameters": size, "layer_bytes": layer, "rows": rows}
        write_json(
            options.output_file, {"model": options.model_name_or_path, "threads": threads, "device": where} | found
        )


def print_summary(report: dict[str, Any], where: str) -> None:
    """The table, and the two overheads in a sentence each."""
    table = Table(title=f"training step: {where}")
    for name in ("", "ms, median", "quartiles", "of plain", "rounds' quartiles"):
        table.add_column(name, justify="right" if name else "left")
    for kind, row in report["rows"].items():
        low, high = row["step_quartiles"]
        first, third = row["ratio_quartiles"]
        table.add_row(kind, f"{1e3 * row['step_seconds']:.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                      f"{row['ratio']:.4f}", f"{first:.4f} to {third:.4f}")  # fmt: skip
    show(table)
    low, high = report["measurement_quartiles"]
    print(
        f"one measurement of entropies: {1e3 * report['measurement_seconds']:.1f} ms ({1e3 * low:.1f} to "
        f"{1e3 * high:.1f}), every {ENTROPY_EVERY_N_STEPS} steps: {report['entropy_overhead']:.2%}\n"
        f"recipe over plain Trainer, measurements included: {report['overhead']:+.2%}"
    )


if __name__ == "__main__":
    main()
