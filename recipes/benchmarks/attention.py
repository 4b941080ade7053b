"""Time and peak memory of the attention implementations over the sequence length, beside the baselines.

    python recipes/benchmarks/attention.py --output_dir outputs/benchmark
    python recipes/benchmarks/attention.py --output_dir outputs/quantities --quantities

The first compares every implementation with eager attention, SDPA and FlexAttention in a forward
pass, forward and backward, and a decode step. It writes `benchmark.json`, `benchmark.png` and, with
`--markdown`, `benchmark.md`. The second measures only the ratios that the implementations are held to,
and writes `quantities.json` (and `quantities.md`).
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# Kinetic tracing, which measures memory, prints two lines a measurement unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch._dynamo
import transformers
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

import hf_attnkit
from hf_attnkit.experiment.benchmarking.candidates import PARTS, Problem, candidates, make_call
from hf_attnkit.experiment.benchmarking.measure import peak_bytes, quartiles, time_in_turns
from hf_attnkit.experiment.benchmarking.plot import draw_costs
from hf_attnkit.experiment.benchmarking.quantities import bars, measure_bars, samples
from hf_attnkit.experiment.files import show, write_json, write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BenchmarkArguments:
    """What to measure; attention is causal throughout."""

    output_dir: str = field(metadata={"help": "Folder for the results; one that holds some is refused."})
    implementations: list[str] = field(
        default_factory=lambda: list(candidates(1)),
        metadata={"help": "Rows to measure, baselines included; the one to compare with is always measured."},
    )
    baseline: str = field(default="sdpa", metadata={"help": "The row that ratios are taken to."})
    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192],
        metadata={"help": "Sequence lengths, for a decode step cached tokens."},
    )
    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "forward, backward (with its forward pass), decode."}
    )
    num_attention_heads: int = field(default=8, metadata={"help": "Query heads."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Key/value heads; mqa always has 1."})
    head_dim: int = field(default=64, metadata={"help": "Size of a head."})
    window: int = field(default=256, metadata={"help": "Keys in a window, the query's own included."})
    batch_size: int = field(default=1, metadata={"help": "Sequences in a batch."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; cuda if there is one."})
    repeats: int = field(default=5, metadata={"help": "Counted rounds; each measures every row once."})
    max_quadratic: int = field(
        default=2048, metadata={"help": "Longest length for rows whose memory is quadratic in it."}
    )
    quantities: bool = field(default=False, metadata={"help": "Measure the fixed ratios and their bars instead."})
    markdown: bool = field(default=False, metadata={"help": "Write the tables as markdown too."})


# With --quantities the bars say the sizes; only these arguments still mean something.
_FREE = ("output_dir", "device", "repeats", "quantities", "markdown")


def check(arguments: BenchmarkArguments) -> torch.device:
    """The device to measure on.

    Raises:
        ValueError: for a value that cannot be honoured; nothing has been measured or written then.
    """
    _choose("implementations", arguments.implementations, list(candidates(1)))
    _choose("baseline", [arguments.baseline], list(candidates(1)))
    _choose("parts", arguments.parts, list(PARTS))
    _choose("dtype", [arguments.dtype], list(DTYPES))
    numbers = ("num_attention_heads", "num_key_value_heads", "head_dim", "window", "batch_size", "repeats")
    given = [(name, getattr(arguments, name)) for name in numbers] + [("lengths", n) for n in arguments.lengths]
    for name, value in given:
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if arguments.max_quadratic < 0:
        raise ValueError(f"--max_quadratic {arguments.max_quadratic} must be at least 0; 0 leaves those rows out")
    if arguments.num_attention_heads % arguments.num_key_value_heads:
        raise ValueError(
            f"--num_key_value_heads {arguments.num_key_value_heads} must divide --num_attention_heads "
            f"{arguments.num_attention_heads}; choose a divisor"
        )
    if arguments.quantities:
        for entry in fields(arguments):
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            if entry.name not in _FREE and getattr(arguments, entry.name) != default:
                raise ValueError(
                    f"--{entry.name} {getattr(arguments, entry.name)} has no effect with --quantities, whose sizes the "
                    f"bars fix; leave one of the two out"
                )
    name = result_name(arguments)
    if (Path(arguments.output_dir) / name).exists():
        raise ValueError(f"--output_dir {arguments.output_dir} holds a finished run ({name}); name another folder")
    return _device(arguments.device)


def _choose(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"--{name} {value} is unknown; choose from {', '.join(known)}")


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ValueError(f"--device {name} must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"--device {name} is not there: PyTorch sees {count} CUDA devices; use --device cpu")
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu")


def result_name(arguments: BenchmarkArguments) -> str:
    """The file whose presence marks a finished run."""
    return "quantities.json" if arguments.quantities else "benchmark.json"


def describe(device: torch.device, arguments: BenchmarkArguments) -> dict[str, Any]:
    """Where and how the numbers were obtained."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": {"type": device.type, "name": name},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, hf_attnkit)},
        },
        "command": shlex.join(["python", *sys.argv]),
        "arguments": asdict(arguments),
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(arguments: BenchmarkArguments, device: torch.device) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The measurements, and what was left out with the reason; records as they stand in the JSON file.

    Raises:
        ValueError: if nothing of what was asked for can run here.
    """
    rows = candidates(arguments.window)
    labels = [label for label in rows if label in {arguments.baseline, *arguments.implementations}]
    plan, left_out = [], []
    for part in (part for part in PARTS if part in arguments.parts):
        for length in sorted(set(arguments.lengths)):
            problem = Problem(
                length=length,
                is_decode=part == "decode",
                dtype=DTYPES[arguments.dtype],
                device=device,
                **{
                    name: getattr(arguments, name)
                    for name in ("batch_size", "num_attention_heads", "num_key_value_heads", "head_dim", "window")
                },
            )
            obstacles = {label: rows[label].obstacle(problem, part, arguments.max_quadratic) for label in labels}
            here = {"part": part, "length": length}
            left_out += [{"candidate": label, **here, "reason": why} for label, why in obstacles.items() if why]
            plan.append((part, problem, [label for label, why in obstacles.items() if not why]))

    if not any(chosen for *_, chosen in plan):
        reasons = "; ".join(notes({"left_out": left_out}))
        raise ValueError(f"nothing can be measured with these arguments ({reasons}); choose other --implementations")
    found = []
    progress = tqdm(total=sum(len(chosen) * (arguments.repeats + 2) for *_, chosen in plan), unit="sample")
    with progress:
        for part, problem, chosen in plan:

            def step(label: str, where: str = f"{PARTS[part]} {problem.length:,}") -> None:
                progress.set_description(f"{where} {label}")
                progress.update()

            calls = {label: make_call(rows[label], problem, part) for label in chosen}
            seconds = time_in_turns(calls, arguments.repeats, device, step)
            base = quartiles(seconds[arguments.baseline])[1] if arguments.baseline in seconds else None
            for label in chosen:
                step(label)
                lower, median, upper = quartiles(seconds[label])
                found.append(
                    {
                        "candidate": label,
                        "implementation": rows[label].implementation,
                        "options": rows[label].options,
                        "computes": rows[label].computes,
                        "part": part,
                        "length": problem.length,
                        "median_seconds": median,
                        "quartiles_seconds": [lower, upper],
                        "ratio_to_baseline": base and median / base,
                        "peak_bytes": peak_bytes(calls[label], device),
                        "seconds": seconds[label],
                    }
                )
    return found, left_out


Grid = tuple[str, list[str], list[list[str]]]  # title, header, rows


def cost_tables(results: dict[str, Any]) -> list[Grid]:
    """For each part a table of times and one of peak memory; a dash where a candidate was not measured."""
    found = {(r["part"], r["candidate"], r["length"]): r for r in results["measurements"]}
    records = results["measurements"] + results["left_out"]
    # What ran nowhere has no row; `notes` says why.
    labels = [label for label in candidates(1) if any(label == r["candidate"] for r in results["measurements"])]
    lengths = sorted({r["length"] for r in records})
    baseline, tables = results["arguments"]["baseline"], []
    for part, name in PARTS.items():
        if not any(r["part"] == part for r in records):
            continue
        header = ["", *(f"{length:,}" for length in lengths)]
        times = [[label, *(_time(found.get((part, label, n))) for n in lengths)] for label in labels]
        memory = [[label, *(_memory(found.get((part, label, n))) for n in lengths)] for label in labels]
        times_title = f"{name}: median ms (interquartile range) and ratio to {baseline}, over tokens"
        tables.append((times_title, header, times))
        tables.append((f"{name}: peak memory in MiB, inputs not counted, over tokens", header, memory))
    return tables


def _time(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    lower, upper = record["quartiles_seconds"]
    ratio = record["ratio_to_baseline"]
    text = f"{record['median_seconds'] * 1e3:,.3g} ({(upper - lower) * 1e3:.2g})"
    return text if ratio is None else f"{text} {ratio:.2f}x"


def _memory(record: dict[str, Any] | None) -> str:
    return "-" if record is None else f"{record['peak_bytes'] / 2**20:,.3g}"


def quantity_table(results: dict[str, Any]) -> Grid:
    """One row a bar."""
    rows = []
    for found in results["quantities"]:
        lower, upper = found["ratio_quartiles"]
        verdict = {True: "pass", False: "MISS", None: "-"}[found["is_met"]]
        cells = (f"{found['ratio']:.3g}", f"{lower:.3g} to {upper:.3g}", found["bar"] or "-", verdict)
        rows.append([found["what"], *cells])
    return "ratios", ["what", "ratio", "quartiles", "bar", ""], rows


def notes(results: dict[str, Any]) -> list[str]:
    """Each reason for which something was left out, with the rows it holds for."""
    reasons: dict[str, list[str]] = {}
    for record in results.get("left_out", []):
        labels = reasons.setdefault(record["reason"], [])
        labels += [record["candidate"]] if record["candidate"] not in labels else []
    return [f"not measured: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def as_markdown(tables: Sequence[Grid], results: dict[str, Any]) -> str:
    """The tables for a document, under a line that says where they come from."""
    lines = [where(results), ""]
    for title, header, rows in tables:
        lines += [f"**{title}**", "", f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += [f"- {note}" for note in notes(results)]
    return "\n".join([*lines, "", f"`{results['command']}`"]) + "\n"


def where(results: dict[str, Any]) -> str:
    """Device, threads and versions in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"{results['device']['name']} ({results['device']['type']}), {results['threads']} threads, {versions}"


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
