"""`convert_checkpoint`: convert a checkpoint to grouped-query attention shard by shard, without loading the model.

Peak memory is that of a process with Transformers, one group of heads in float64, one layer's second moment
and one output projection, whatever the model's size.

An interrupted conversion is completed by the same call: shards get their names when they are complete
and on the disk, a marker says what is being made, and config.json, without which nothing loads, comes last.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_attnkit.common.version import __version__
from hf_attnkit.conversion.checkpoints import safetensors_stream
from hf_attnkit.conversion.checkpoints.shards import Shards
from hf_attnkit.conversion.checkpoints.source import CONFIG, INDEX, MARKER, Checkpoint, read_json
from hf_attnkit.conversion.merging import choose_merging
from hf_attnkit.conversion.report import summary
from hf_attnkit.conversion.statistics import StatisticsFile, require_sizes
from hf_attnkit.conversion.target_heads import target_heads
from hf_attnkit.models.whole import configs_in


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What was converted; prints as two lines. `plan_gqa` of the loaded model predicts what it loses.

    Attributes:
        method, key_method: for values and for keys.
        heads_before, heads_after: number of key/value heads of each layer.
        num_tokens: of the statistics; `None` without.
        bytes_before, bytes_after: of the key/value cache per token, all layers, in the checkpoint's dtype.
    """

    method: str
    key_method: str
    heads_before: tuple[int, ...]
    heads_after: tuple[int, ...]
    num_tokens: int | None
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        pairs = [f"{old} -> {new}" for old, new in zip(self.heads_before, self.heads_after, strict=True)]
        if len(set(pairs)) == 1:
            heads = f"{pairs[0]} in each of {len(pairs)} layers"
        else:
            heads = ", ".join(f"layer {index}: {pair}" for index, pair in enumerate(pairs))
        line = summary(self.method, self.key_method, self.num_tokens, self.bytes_before, self.bytes_after)
        return f"key/value heads {heads}\n{line}"


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    num_key_value_heads: int | Sequence[int] | None = None,
    *,
    method: str | None = None,
    key_method: str | None = None,
    statistics: str | os.PathLike[str] | None = None,
) -> ConvertedCheckpoint:
    """Convert a folder of safetensors to grouped-query attention.

    The tensors are bit by bit those that `convert_to_gqa` of the loaded model would save, shards keep their
    names, and all other files of the folder's top level are carried over. The same call completes an
    interrupted conversion.

    Args:
        source: a folder with config.json and model.safetensors, or shards and their index.
        target: a folder that is absent, empty, or was left by the same call.
        num_key_value_heads, method, key_method: as `convert_to_gqa`, whose defaults they have, statistics being the
            calibration; groups are of adjacent heads.
        statistics: a file that `Statistics.save` wrote, for "pca".

    Raises:
        ValueError: as `convert_to_gqa`; for a checkpoint that is incomplete, damaged, quantized, swapped, in another
            format or with links to files outside its folder, statistics of another model, and a target that holds
            something else. Nothing is written.
        FileNotFoundError: for files that do not exist.
        OSError: if writing fails, for example on a full disk; the same call then completes the conversion.
    """
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint(source)
    layers = checkpoint.layers
    merging = choose_merging(layers, method, key_method, calibrated=statistics is not None)
    method, key_method = merging.method, merging.key_method
    if "random" in (method, key_method):
        raise ValueError(
            "method 'random' draws heads, so a conversion that was interrupted could not be completed; take 'first', "
            "or convert_to_gqa on the loaded model"
        )
    numbers = target_heads(layers, num_key_value_heads, allow_same=merging.uses_statistics)
    moments = None
    if statistics is not None:
        if not merging.uses_statistics:
            raise ValueError(f"method {method!r} uses no data, so statistics would have no effect; leave them out")
        moments = StatisticsFile(Path(statistics))
        require_sizes(layers, moments.sizes)
        merging.check_tokens(layers, numbers, moments.num_tokens)
        for index in range(len(moments.sizes)):
            moments.second_moment(index)  # refuses what is not finite, before anything is written
    merging.check_numbers(layers, numbers)
    config = checkpoint.small.converted_config(numbers)
    key_dtype = checkpoint.key_dtype
    for each in configs_in(config):
        if each.dtype is None:
            each.dtype = key_dtype
    marker = _marker(checkpoint, numbers, method, key_method, statistics)
    _claim(source, target, marker)

    conversion = Shards(checkpoint, numbers, merging, moments)
    conversion.write_shards(target)
    _finish(checkpoint, conversion, config, target)
    before, after = tuple(layer.num_key_value_heads for layer in layers), tuple(numbers)
    bytes_before, bytes_after = (
        sum(n * (a.head_dim + a.value_head_dim) for a, n in zip(layers, heads, strict=True)) * key_dtype.itemsize
        for heads in (before, after)
    )
    tokens = None if moments is None else moments.num_tokens
    return ConvertedCheckpoint(method, key_method, before, after, tokens, bytes_before, bytes_after)


def _marker(
    checkpoint: Checkpoint,
    numbers: Sequence[int],
    method: str,
    key_method: str,
    statistics: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """All that decides what is written."""

    def state(path: Path) -> list[int]:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]

    files = sorted([CONFIG, *checkpoint.shards, *([INDEX] if checkpoint.index is not None else [])])
    return {
        "hf_attnkit": __version__,
        "source": str(checkpoint.folder.resolve()),
        "files": {name: state(checkpoint.folder / name) for name in files},
        "num_key_value_heads": list(numbers),
        "method": method,
        "key_method": key_method,
        "statistics": None if statistics is None else [str(Path(statistics).resolve()), *state(Path(statistics))],
    }


def _claim(source: Path, target: Path, marker: dict[str, Any]) -> None:
    """Make the folder and put the marker into it, or find it there."""
    if target.resolve() == source.resolve():
        raise ValueError(f"source and target are the same folder, {target}; a conversion writes a new one")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()):
        found = target / MARKER
        if not found.exists() and [path.name for path in target.iterdir()] != [f"{MARKER}.partial"]:
            raise ValueError(f"{target} is not empty and was not left by an interrupted conversion; give a new folder")
        if found.exists():
            before = read_json(found)
            changed = [name for name, value in marker.items() if before.get(name) != value]
            if changed:
                raise ValueError(
                    f"{target} was left by another conversion, which differs in {', '.join(changed)}; give a new "
                    "folder, or empty this one"
                )
            return
    target.mkdir(parents=True, exist_ok=True)
    with _in_one_step(target / MARKER) as path:
        path.write_text(json.dumps(marker, indent=2) + "\n")


def _finish(checkpoint: Checkpoint, conversion: Shards, config: PreTrainedConfig, target: Path) -> None:
    """Index, other files and, last, the config."""
    if checkpoint.index is not None:
        entries = [entry for shard in checkpoint.shards for entry in conversion.entries(shard).values()]
        sizes = {
            "total_size": sum(entry.nbytes for entry in entries),
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
        }
        metadata = checkpoint.index.get("metadata") or {}
        metadata |= {name: size for name, size in sizes.items() if name in metadata or name == "total_size"}
        with _in_one_step(target / INDEX) as path:
            path.write_text(json.dumps(checkpoint.index | {"metadata": metadata}, indent=2, sort_keys=True) + "\n")
    for other in checkpoint.carried:
        with _in_one_step(target / other.name) as path:
            shutil.copyfile(other, path)
    with _in_one_step(target / CONFIG) as path:
        path.write_text(config.to_json_string(use_diff=True))
    (target / MARKER).unlink()
    safetensors_stream.sync_folder(target)


@contextmanager
def _in_one_step(path: Path) -> Iterator[Path]:
    """A name to write to; afterwards the file is on the disk and gets its own name."""
    yield safetensors_stream.partial(path)
    with open(safetensors_stream.partial(path), "rb+") as file:
        os.fsync(file.fileno())
    safetensors_stream.rename(path)
