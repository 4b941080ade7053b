"""`convert_checkpoint`: convert a checkpoint to grouped-query attention shard by shard, without loading the model.

The skeleton of the model, on the meta device, says where the projections are; their tensors are read
from the shards one group of heads at a time, keys with queries and values with outputs, and all other
tensors are copied. Peak memory is that of a process with Transformers, one group in float64, one
layer's second moment and one output projection, whatever the model's size.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .. import families, safetensors_stream
from ..cache_size import cache_bytes
from ..change import require_unshared
from ..families import AttentionLayer
from ..loading import skeleton
from ..safetensors_stream import DTYPES, Entry, Reader, Writer
from . import plan, targets
from .grouping import adjacent
from .heads import ABSENT, Heads
from .methods import KeyHalf, ValueHalf, constant, lost_share, merge_keys, merge_values, uses_statistics
from .statistics import StatisticsFile

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MARKER = "conversion_unfinished.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json",
           ".partial")  # fmt: skip
PROJECTIONS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What was converted; prints as a plan does.

    Attributes:
        layers: one `LayerPlan` each; a loss is NaN if an earlier, interrupted call converted that layer.
        num_tokens: of the statistics; `None` without.
        bytes_before, bytes_after: of the key/value cache per token, all layers, in the checkpoint's dtype.
    """

    method: str
    key_method: str
    layers: tuple[plan.LayerPlan, ...]
    num_tokens: int | None
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return plan.describe(self)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    num_key_value_heads: int | Sequence[int] | None = None,
    *,
    method: str = "mean",
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
        num_key_value_heads, method, key_method: as `convert_to_gqa`; groups are of adjacent heads.
        statistics: a file that `Statistics.save` wrote, for "pca".

    Raises:
        ValueError: as `convert_to_gqa`; for a checkpoint that is incomplete, damaged, quantized, swapped or in
            another format, statistics of another model, and a target that holds something else. Nothing is written.
        FileNotFoundError: for files that do not exist.
        OSError: if writing fails, for example on a full disk; the same call then completes the conversion.
    """
    source, target = Path(source), Path(target)
    checkpoint = _Checkpoint(source)
    layers = checkpoint.layers
    key_method = method if key_method is None else key_method
    plan.check(layers, method, key_method, "adjacent")
    if "random" in (method, key_method):
        raise ValueError(
            "method 'random' draws heads, so a conversion that was interrupted could not be completed; take 'first', "
            "or convert_to_gqa on the loaded model"
        )
    used = uses_statistics(method) or uses_statistics(key_method)
    numbers = targets.numbers(layers, num_key_value_heads, allow_same=used)
    moments = None
    if statistics is not None:
        if not used:
            raise ValueError(f"method {method!r} uses no data, so statistics would have no effect; leave them out")
        moments = StatisticsFile(Path(statistics))
        plan.require_sizes(layers, moments.sizes)
        plan.require_tokens(layers, numbers, moments.num_tokens, (method, key_method))
        for index in range(len(moments.sizes)):
            moments.second_moment(index)  # refuses what is not finite, before anything is written
    config = families.with_heads(checkpoint.model, [(a.num_heads, n) for a, n in zip(layers, numbers, strict=True)])
    key_dtype = DTYPES[checkpoint.entry(checkpoint.places[0]["key"].weight).dtype]
    if config.dtype is None:
        config.dtype = key_dtype
    marker = _marker(checkpoint, numbers, method, key_method, statistics)
    _claim(source, target, marker)

    conversion = _Conversion(checkpoint, numbers, method, key_method, moments)
    conversion.write_shards(target)
    _finish(checkpoint, conversion, config, target)
    before = cache_bytes([(layer.num_key_value_heads, layer.head_dim) for layer in layers], key_dtype)
    after = cache_bytes([(number, layer.head_dim) for layer, number in zip(layers, numbers, strict=True)], key_dtype)
    tokens = None if moments is None else moments.num_tokens
    return ConvertedCheckpoint(method, key_method, conversion.planned(), tokens, before, after)


@dataclass(frozen=True)
class _Place:
    """A projection in a checkpoint: names of its tensors, and its rows in them."""

    weight: str
    bias: str | None
    rows: slice


class _Checkpoint:
    """A folder's shards and the projections in them.

    Attributes:
        shards: file name -> reader.
        index: the content of the index, `None` for a single file.
        model: the skeleton.
        places: per layer, projection -> place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _config(folder)
        self.index, names = _files(folder)
        self.shards = {name: Reader(folder / name) for name in names}
        self._readers = {tensor: reader for reader in self.shards.values() for tensor in reader.entries}
        if self.index is not None:
            for tensor, name in self.index["weight_map"].items():
                if tensor not in self.shards[name].entries:
                    raise ValueError(f"{folder / INDEX} lists {tensor!r} in {name}, which does not hold it")
        self.model: PreTrainedModel = skeleton(config)
        self.layers = families.editable_layers(self.model, skeleton=True)
        require_unshared(self.model, self.layers)
        saved = _saved_names(self.model, self.layers)
        self.places = [self._places(layer, saved) for layer in self.layers]

    def entry(self, tensor: str) -> Entry:
        return self._readers[tensor].entries[tensor]

    def rows(self, tensor: str, rows: slice = slice(None)) -> Tensor:
        return self._readers[tensor].rows(tensor, rows)

    def _places(self, layer: AttentionLayer, saved: dict[int, str]) -> dict[str, _Place]:
        found = {}
        for name in PROJECTIONS:
            linear: nn.Linear = getattr(layer, name)
            weight = self._find(linear.weight, saved, layer, name)
            bias = None if linear.bias is None else self._find(linear.bias, saved, layer, name)
            found[name] = _Place(weight, bias, layer.rows(name))
        return found

    def _find(self, parameter: Tensor, saved: dict[int, str], layer: AttentionLayer, projection: str) -> str:
        name, prefix = saved[id(parameter)], f"{self.model.base_model_prefix}."
        # Transformers loads a base model into a model with a head and the other way round.
        found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in self._readers), None)
        if found is None:
            raise ValueError(
                f"{layer.name}: the checkpoint in {self.folder} has no tensor {name!r} (the {projection} projection of "
                f"{type(self.model).__name__}); if it is in an older layout, load it with hf_attnkit.load_pretrained "
                "and save it with save_pretrained"
            )
        entry = self.entry(found)
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{found!r} is {entry.dtype}: the checkpoint is quantized; convert the checkpoint that it was made "
                "from, and quantize the result"
            )
        if entry.shape != tuple(parameter.shape):
            raise ValueError(
                f"{found!r} has the shape {entry.shape}, but the config asks for {tuple(parameter.shape)}; correct the "
                "config's numbers of heads"
            )
        return found


class _Conversion:
    """Computes the new tensors of a checkpoint and writes its shards."""

    def __init__(
        self,
        checkpoint: _Checkpoint,
        numbers: Sequence[int],
        method: str,
        key_method: str,
        moments: StatisticsFile | None,
    ) -> None:
        self._checkpoint, self._numbers, self._moments = checkpoint, numbers, moments
        self._method, self._key_method = method, key_method
        self._losses = {layer.index: {"keys": math.nan, "values": math.nan} for layer in checkpoint.layers}
        self._moment: tuple[int, Tensor] | None = None
        # Where rows of the new tensors begin, the new tensors' sizes, and which halves of which layers fill a tensor.
        self._first: list[dict[str, int]] = []
        self._entries: dict[str, Entry] = {}
        self._halves: dict[str, list[tuple[AttentionLayer, str]]] = {}
        for layer, number, places in zip(checkpoint.layers, numbers, checkpoint.places, strict=True):
            fewer = (layer.num_key_value_heads - number) * layer.head_dim
            first = {name: places[name].rows.start for name in PROJECTIONS}
            if layer.fused:
                first["value"] -= fewer
            self._first.append(first)
            removed = {"query": 2 * fewer if layer.fused else 0, "key": fewer, "value": fewer, "output": 0}
            for name, place in places.items():
                for tensor in filter(None, (place.weight, place.bias)):
                    self._halves.setdefault(tensor, []).append(
                        (layer, "keys" if name in ("query", "key") else "values")
                    )
                    if tensor not in self._entries:  # a fused tensor's size is said once, with the query
                        self._entries[tensor] = _fewer_rows(checkpoint.entry(tensor), removed[name])

    def planned(self) -> tuple[plan.LayerPlan, ...]:
        """What was done and what it loses."""
        return tuple(
            plan.LayerPlan(
                layer.index, layer.num_heads, number, layer.head_dim,
                tuple(adjacent(layer.num_key_value_heads, number)),
                self._losses[layer.index]["keys"], self._losses[layer.index]["values"],
            )
            for layer, number in zip(self._checkpoint.layers, self._numbers, strict=True)
        )  # fmt: skip

    def entries(self, shard: str) -> dict[str, Entry]:
        """The tensors of a new shard, in the order of the old one."""
        old = self._checkpoint.shards[shard].entries
        return {name: self._entries.get(name, entry) for name, entry in old.items()}

    def write_shards(self, folder: Path) -> None:
        """Write those shards that are not there yet."""
        sizes = {shard: sum(e.nbytes for e in self.entries(shard).values()) for shard in self._checkpoint.shards}
        with tqdm(total=sum(sizes.values()), desc="converting", unit="B", unit_scale=True) as bar:
            for shard, reader in self._checkpoint.shards.items():
                if self._is_complete(folder / shard, shard):
                    bar.update(sizes[shard])
                    continue
                with Writer(folder / shard, self.entries(shard), reader.metadata, bar.update) as writer:
                    self._write(reader, writer)

    def _is_complete(self, path: Path, shard: str) -> bool:
        """Whether an earlier call wrote it; then it has its name, and all of its data are on the disk."""
        if not path.exists():
            return False
        if Reader(path).entries != self.entries(shard):
            raise ValueError(f"{path} is not what an interrupted conversion left; empty the folder and start again")
        return True

    def _write(self, reader: Reader, writer: Writer) -> None:
        """Fill a shard. A half of a layer that two shards share is computed for each of them."""
        done = set()
        for tensor in reader.entries:
            if tensor not in self._halves:
                writer.copy(reader, tensor)
            for layer, half in self._halves.get(tensor, ()):
                if (layer.index, half) not in done:
                    done.add((layer.index, half))
                    (self._keys if half == "keys" else self._values)(layer, writer)

    def _keys(self, layer: AttentionLayer, writer: Writer) -> None:
        """Queries and keys of a layer."""
        halves: list[KeyHalf] = []
        for number, members in enumerate(self._groups(layer)):
            size = len(members) * layer.head_dim
            query = self._read(layer, "query", number, size * layer.group_size)
            key = self._read(layer, "key", number, size)
            heads = Heads(
                query.view(len(members), layer.group_size, layer.head_dim, -1),
                key.view(len(members), layer.head_dim, -1), ABSENT, ABSENT, layer.rope, layer.norm,
            )  # fmt: skip
            half = merge_keys(heads, self._second_moment(layer), self._key_method)
            self._put(writer, layer, "query", number, half.query.flatten(0, 2))
            self._put(writer, layer, "key", number, half.key)
            halves.append(half._replace(query=ABSENT, key=ABSENT))
        self._losses[layer.index]["keys"] = lost_share(halves)

    def _values(self, layer: AttentionLayer, writer: Writer) -> None:
        """Values and output projection of a layer."""
        halves: list[ValueHalf] = []
        place = self._checkpoint.places[layer.index]["output"]
        weight = self._checkpoint.rows(place.weight)
        for number, members in enumerate(self._groups(layer)):
            size = len(members) * layer.head_dim
            value = self._read(layer, "value", number, size)
            columns = weight[:, number * size * layer.group_size : (number + 1) * size * layer.group_size]
            output = columns.double().unflatten(1, (len(members), -1, layer.head_dim)).permute(1, 2, 0, 3).contiguous()
            heads = Heads(
                ABSENT, ABSENT, value.view(len(members), layer.head_dim, -1), output, layer.rope, layer.norm,
                place.bias is not None,
            )  # fmt: skip
            half = merge_values(heads, self._second_moment(layer), self._method)
            columns.copy_(half.output.permute(2, 0, 1, 3).flatten(1))
            self._put(writer, layer, "value", number, half.value)
            halves.append(half._replace(value=ABSENT, output=ABSENT))
        if place.weight in writer.entries:
            writer.rows(place.weight, weight)
        if place.bias is not None and place.bias in writer.entries:
            bias, moved = self._checkpoint.rows(place.bias), constant(halves)
            writer.rows(place.bias, bias if moved is None else (bias.double() + moved).to(bias.dtype))
        self._losses[layer.index]["values"] = lost_share(halves)

    def _groups(self, layer: AttentionLayer) -> list[tuple[int, ...]]:
        return adjacent(layer.num_key_value_heads, self._numbers[layer.index])

    def _second_moment(self, layer: AttentionLayer) -> Tensor:
        """The layer's, kept while it is the last one asked for."""
        if self._moment is None or self._moment[0] != layer.index:
            self._moment = None
            size = layer.key.in_features + 1
            found = torch.ones(size, dtype=torch.float64)
            self._moment = layer.index, found if self._moments is None else self._moments.second_moment(layer.index)
        return self._moment[1]

    def _read(self, layer: AttentionLayer, name: str, number: int, count: int) -> Tensor:
        """Rows of a group in float64, their bias appended, `(count, m + 1)`."""
        place = self._checkpoint.places[layer.index][name]
        start = place.rows.start + number * count
        weight = self._checkpoint.rows(place.weight, slice(start, start + count)).double()
        bias = weight.new_zeros(count)
        if place.bias is not None:
            bias = self._checkpoint.rows(place.bias, slice(start, start + count)).double()
        return torch.cat([weight, bias[:, None]], dim=1)

    def _put(self, writer: Writer, layer: AttentionLayer, name: str, number: int, rows: Tensor) -> None:
        """Write what belongs to this shard of a group's new rows, `(count, m + 1)`."""
        place = self._checkpoint.places[layer.index][name]
        first = self._first[layer.index][name] + number * len(rows)
        for tensor, values in ((place.weight, rows[:, :-1]), (place.bias, rows[:, -1])):
            if tensor is not None and tensor in writer.entries:
                writer.rows(tensor, values.to(DTYPES[writer.entries[tensor].dtype]), first)


def _fewer_rows(entry: Entry, removed: int) -> Entry:
    rows = entry.shape[0] - removed
    return replace(entry, shape=(rows, *entry.shape[1:]), nbytes=entry.nbytes // entry.shape[0] * rows)


def _config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint that can be converted."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a checkpoint")
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the checkpoint in {folder} is quantized; convert the one that it was made from, and quantize the result"
        )
    if getattr(config, "hf_attnkit", None) is not None:
        raise ValueError(
            f"the attention of the checkpoint in {folder} was swapped; load it with hf_attnkit.load_pretrained, call "
            "restore_attention or convert_to_gqa, and save it"
        )
    if not config.architectures:
        raise ValueError(f'{folder / CONFIG} names no class; add it, for example "architectures": ["LlamaForCausalLM"]')
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds PEFT adapters; merge them first: model = model.merge_and_unload()")
    return config


def _files(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, if there is one, and the names of the shards; one file goes before an index, as in Transformers."""
    if (folder / SINGLE).is_file():
        return None, [SINGLE]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        outside = [name for name in names if Path(name).name != name]
        if absent or outside:
            raise ValueError(f"{folder / INDEX} lists {(absent or outside)[0]}, which is not in the folder")
        return index, names
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS))
    remedy = "load the model with hf_attnkit.load_pretrained (GGUF: gguf_file=...) and save it with save_pretrained"
    given = f"weights in another format ({', '.join(others[:3])}): {remedy}" if others else "no weights"
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}, but {given}")


def _saved_names(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> dict[int, str]:
    """What `save_pretrained` calls the projections' parameters, by their id: some classes save under older names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {}
    for layer in layers:
        for projection in PROJECTIONS:
            for parameter in getattr(layer, projection).parameters():
                wanted[names[id(parameter)]] = parameter
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(wanted)).items()}
    if saved.keys() != {id(tensor) for tensor in wanted.values()}:
        raise ValueError(
            f"{type(model).__name__} saves attention projections in other tensors than it runs them; load it with "
            "hf_attnkit.load_pretrained, call convert_to_gqa and save it"
        )
    return saved


def _marker(
    checkpoint: _Checkpoint,
    numbers: Sequence[int],
    method: str,
    key_method: str,
    statistics: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """All that decides what is written."""
    from .. import __version__

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
            before = json.loads(found.read_text())
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


def _finish(checkpoint: _Checkpoint, conversion: _Conversion, config: PreTrainedConfig, target: Path) -> None:
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
    for other in sorted(checkpoint.folder.iterdir()):
        if other.is_file() and other.name not in (CONFIG, MARKER) and not other.name.endswith(WEIGHTS):
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
