"""Time and peak memory of the attention implementations over the sequence length, next to the baselines.

    python recipes/benchmarks/attention.py --output_dir outputs/benchmark
    python recipes/benchmarks/attention.py --output_dir outputs/quantities --quantities

The first compares every implementation with eager attention, SDPA and FlexAttention in a forward
pass, forward and backward, and a decode step. It writes `benchmark.json`, `benchmark.png` and, with
`--markdown`, `benchmark.md`. The second measures only the ratios that the implementations are held to,
and writes `quantities.json` (and `quantities.md`).
"""

from __future__ import annotations

import os
from pathlib import Path

# Kinetic tracing, which measures memory, prints two lines a measurement unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch._dynamo
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

from hf_attnkit.experiment.benchmarking.arguments import BenchmarkArguments, check, result_name
from hf_attnkit.experiment.benchmarking.costs import describe, measure
from hf_attnkit.experiment.benchmarking.plot import draw_costs
from hf_attnkit.experiment.benchmarking.quantities import bars, measure_bars, samples
from hf_attnkit.experiment.benchmarking.tables import as_markdown, cost_tables, notes, quantity_table, where
from hf_attnkit.experiment.files import show, write_json, write_text


def main() -> None:
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    device = check(arguments)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # By default the ninth size of a compiled function runs uncompiled: FlexAttention with all scores in memory.
    with torch._dynamo.config.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True):
        run(arguments, device)


def run(arguments: BenchmarkArguments, device: torch.device) -> None:
    """Measure, write the files, print the tables."""
    output, results = Path(arguments.output_dir), describe(device, arguments)
    if arguments.quantities:
        chosen = bars(device)
        with tqdm(total=samples(chosen, arguments.repeats), unit="sample") as progress:

            def step(label: str) -> None:
                progress.set_description(label)
                progress.update()

            results["quantities"] = measure_bars(chosen, arguments.repeats, step)
        tables = [quantity_table(results)]
    else:
        results["measurements"], results["left_out"] = measure(arguments, device)
        tables = cost_tables(results)
        heads = f"{arguments.num_attention_heads} over {arguments.num_key_value_heads} heads x {arguments.head_dim}"
        title = f"{results['device']['name']}, {arguments.dtype}, {heads}, batch {arguments.batch_size}"
        draw_costs(results["measurements"], f"{title}, window {arguments.window}", output / "benchmark.png")
    path = output / result_name(arguments)
    if arguments.markdown:
        write_text(path.with_suffix(".md"), as_markdown(tables, results))
    write_json(path, results)
    for title, header, rows in tables:
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        show(table)
    print(*notes(results), where(results), path, sep="\n")


if __name__ == "__main__":
    main()
