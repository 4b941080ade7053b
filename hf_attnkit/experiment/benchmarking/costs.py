"""Time and peak memory of each candidate, over parts and lengths; and where the numbers were obtained."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import hf_attnkit
from hf_attnkit.experiment.benchmarking.arguments import DTYPES, BenchmarkArguments
from hf_attnkit.experiment.benchmarking.candidates import PARTS, Problem, candidates, make_call
from hf_attnkit.experiment.benchmarking.measure import peak_bytes, quartiles, time_alternately
from hf_attnkit.experiment.benchmarking.tables import notes


def describe(device: torch.device, arguments: BenchmarkArguments) -> dict[str, Any]:
    """Where and how the numbers were obtained."""
    return surroundings(device) | {"arguments": asdict(arguments)}


def surroundings(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": {"type": device.type, "name": name},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, hf_attnkit)},
        },
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(arguments: BenchmarkArguments, device: torch.device) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The measurements, and what was left out with the reason; records as in the JSON file.

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
            seconds = time_alternately(calls, arguments.repeats, device, step)
            base = quartiles(seconds[arguments.baseline])[1] if arguments.baseline in seconds else None
            for label in chosen:
                step(label)
                lower, median, upper = quartiles(seconds[label])
                kept = rows[label].kept
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
                        "kept_bytes": kept(problem) if kept and problem.is_decode else None,
                        "seconds": seconds[label],
                    }
                )
    return found, left_out
