"""The backends of exact and windowed attention against each other: what `backend="auto"` takes, and what is fastest.

    python recipes/benchmarks/backends.py --output_dir outputs/backends
    python recipes/benchmarks/backends.py --output_dir outputs/backends --device cpu --lengths 256 1024 4096

Every backend that can compute a case is timed alternately with the others, in each length, dtype and pass. The first
call, which compiles, has a column of its own. The most important cases come first; `--max_seconds` ends the run before
the next one, and the output says what was left out. `--flex_lengths` compares FlexAttention compiled for each length
with FlexAttention compiled once for all. Writes backends.json and backends.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from hf_attnkit.experiment.benchmarking import flex_lengths
from hf_attnkit.experiment.benchmarking.arguments import DTYPES, choose_device
from hf_attnkit.experiment.benchmarking.backends import CASES, PARTS, Sizes, measure, problems, tables
from hf_attnkit.experiment.benchmarking.costs import surroundings
from hf_attnkit.experiment.benchmarking.tables import as_markdown, where
from hf_attnkit.experiment.files import show, write_json, write_text


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the results")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; by default 512 to 32768, on a CPU to 2048")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="by default bfloat16 and float32, on a CPU float32"
    )
    parser.add_argument("--batch_size", type=int, default=2, help="sequences; the first is never padded")
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 8, help="query heads")
    parser.add_argument("--kv_heads", type=int, default=4 if on_gpu else 2, help="key/value heads")
    parser.add_argument("--head_dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--window", type=int, default=256, help="keys in a window, the query's own included")
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    parser.add_argument(
        "--max_quadratic", type=int, default=8192, help="longest length of what forms a matrix of floats"
    )
    parser.add_argument("--max_seconds", type=float, default=600, help="after which no further case is begun")
    parser.add_argument(
        "--flex_lengths",
        type=int,
        nargs="*",
        default=[512, 640, 1000, 2048, 3000] if on_gpu else [],
        help="lengths of the comparison of compiled FlexAttention, in this order; none to leave it out",
    )
    parser.add_argument("--device", help="cpu or cuda; cuda if there is one")
    options = parser.parse_args()
    stop = time.perf_counter() + options.max_seconds
    device = choose_device(options.device)
    on_gpu = device.type == "cuda"
    options.lengths = options.lengths or ([512, 2048, 8192, 32768] if on_gpu else [512, 2048])
    options.dtypes = options.dtypes or (["bfloat16", "float32"] if on_gpu else ["float32"])
    if (
        min(options.batch_size, options.repeats, options.window, *options.lengths, *options.flex_lengths) < 1
        or options.heads % options.kv_heads
    ):
        parser.error("sizes must be at least 1, and --kv_heads must divide --heads")
    sizes = Sizes(options.batch_size, options.heads, options.kv_heads, options.head_dim, options.window, device)
    results = surroundings(device) | {"arguments": vars(options) | {"output_dir": str(options.output_dir)}}
    run(options, sizes, stop, results)
    grids = tables(results)
    if results["flex_lengths"]:
        grids.append(flex_lengths.table(results["flex_lengths"]))
    text = as_markdown(grids, results | {"left_out": []})
    notes = left_out_notes(results["left_out"])
    write_text(options.output_dir / "backends.md", "\n".join([text, *notes]) + "\n")
    write_json(options.output_dir / "backends.json", results)
    for title, header, rows in grids:
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        show(table)
    print(where(results), *notes, options.output_dir / "backends.json", sep="\n")


def left_out_notes(left_out: list[dict[str, Any]]) -> list[str]:
    """One line for each backend and reason."""
    problems: dict[tuple[str, str], list[str]] = {}
    for each in left_out:
        problems.setdefault((each["backend"], each["reason"]), []).append(each["problem"])
    return [
        f"- not measured: {backend}: {reason}: {'; '.join(labels) if len(labels) <= 3 else f'{len(labels)} cases'}"
        for (backend, reason), labels in problems.items()
    ]


def run(options: argparse.Namespace, sizes: Sizes, stop: float, results: dict[str, Any]) -> None:
    """Measure until the time is over; fills `results`."""
    dtypes = [DTYPES[name] for name in options.dtypes]
    todo = list(problems(options.cases, options.lengths, dtypes, options.parts, sizes))
    results |= {"measurements": [], "left_out": [], "flex_lengths": []}
    with tqdm(total=len(todo), unit="case") as progress:
        for part in options.parts if sizes.device.type == "cuda" else ["forward"]:
            if options.flex_lengths:
                results["flex_lengths"] += flex_lengths.compare(
                    options.flex_lengths, dtypes[0], part, sizes, options.repeats, stop, progress.set_description
                )
        for number, problem in enumerate(todo):
            if time.perf_counter() > stop:
                late = f"--max_seconds {options.max_seconds:g} were over"
                results["left_out"] += [{"problem": p.label, "backend": "all", "reason": late} for p in todo[number:]]
                break
            record, left_out = measure(problem, options.repeats, options.max_quadratic, progress.set_description)
            results["measurements"] += [] if record is None else [record]
            results["left_out"] += left_out
            progress.update()


if __name__ == "__main__":
    main()
