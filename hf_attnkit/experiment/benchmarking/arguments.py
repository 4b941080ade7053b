"""What the benchmark of the attention implementations takes, and which of it cannot be measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from hf_attnkit.experiment.benchmarking.candidates import PARTS, candidates, usual

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BenchmarkArguments:
    """What to measure; attention is causal throughout."""

    output_dir: str = field(metadata={"help": "Folder for the results; one that holds some is refused."})
    implementations: list[str] = field(
        default_factory=usual,
        metadata={
            "help": "Rows to measure, baselines included; the one to compare with is always measured. By default all "
            "but linear_*, linear attention with each feature map, a decay, and a window with a gate."
        },
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
    return choose_device(arguments.device)


def _choose(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"--{name} {value} is unknown; choose from {', '.join(known)}")


def choose_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        ValueError: for a name of something else, or of a device that is not there.
    """
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
