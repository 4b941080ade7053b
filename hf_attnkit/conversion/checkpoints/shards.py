"""The new shards of a checkpoint: read, merge and write one group of heads at a time.

Keys are merged with their queries, and values with their output projections, by the functions that convert a
model in memory; a method that does not transform leaves queries and outputs as they are, and they are copied
byte by byte, as are all other tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hf_attnkit.common.progress import progress_bar
from hf_attnkit.conversion.checkpoints.safetensors_stream import DTYPES, Entry, Reader, Writer
from hf_attnkit.conversion.checkpoints.source import PROJECTIONS, Checkpoint
from hf_attnkit.conversion.grouping import adjacent
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.methods.table import merge_keys, merge_values, total_constant, transforms
from hf_attnkit.conversion.statistics import StatisticsFile
from hf_attnkit.models.layers import AttentionLayer


class Shards:
    """The new shards of a checkpoint; a subclass fills them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._resized: dict[str, Entry] = {}

    def entries(self, shard: str) -> dict[str, Entry]:
        """The tensors of a new shard, in the order of the old one."""
        old = self._checkpoint.shards[shard].entries
        return {name: self._resized.get(name, entry) for name, entry in old.items()}

    def write_shards(self, folder: Path) -> None:
        """Write those shards that are not there yet."""
        sizes = {shard: sum(e.nbytes for e in self.entries(shard).values()) for shard in self._checkpoint.shards}
        with progress_bar(total=sum(sizes.values()), description="converting", unit="B", unit_scale=True) as bar:
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
        """Fill a shard."""
        raise NotImplementedError


class ShardConversion(Shards):
    """Computes the new tensors of a checkpoint of the table's families, a group of heads at a time.

    Args:
        numbers: of key/value heads, one for each layer.
        moments: second moments for methods that use them; `None` is the identity.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        numbers: Sequence[int],
        method: str,
        key_method: str,
        moments: StatisticsFile | None,
    ) -> None:
        super().__init__(checkpoint)
        self._numbers, self._moments = numbers, moments
        self._method, self._key_method = method, key_method
        self._moment: tuple[int, Tensor] | None = None
        merged = {
            "keys": ("query", "key") if transforms(key_method) else ("key",),
            "values": ("value", "output") if transforms(method) else ("value",),
        }
        # Where rows of the new tensors begin, the new tensors' sizes, and which halves of which layers fill a tensor.
        self._first: list[dict[str, int]] = []
        self._halves: dict[str, list[tuple[AttentionLayer, str]]] = {}
        for layer, number, places in zip(checkpoint.layers, numbers, checkpoint.places, strict=True):
            fewer = (layer.num_key_value_heads - number) * layer.head_dim
            first = {name: places[name].rows.start for name in PROJECTIONS}
            if layer.fused:
                first["value"] -= fewer
            self._first.append(first)
            for half, names in merged.items():
                for name in names:
                    for tensor in places[name].tensors:
                        self._halves.setdefault(tensor, []).append((layer, half))
            for name in ("key", "value"):
                for tensor in places[name].tensors:  # one tensor, if fused
                    self._resized[tensor] = _fewer_rows(checkpoint.entry(tensor), (2 if layer.fused else 1) * fewer)

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
        """Keys of a layer, and queries where they change with them."""
        transformed = transforms(self._key_method)
        if layer.fused and not transformed:
            place = self._checkpoint.places[layer.index]["query"]
            for tensor in writer.entries.keys() & place.tensors:
                writer.copy(self._checkpoint.reader(tensor), tensor, place.rows)
        for number, members in enumerate(self._groups(layer)):
            query = ABSENT
            if transformed:
                query = self._read(layer, "query", number, len(members) * layer.group_size)
                query = query.unflatten(0, (len(members), layer.group_size))
            key = self._read(layer, "key", number, len(members))
            heads = Heads(query, key, ABSENT, ABSENT, layer.rope, layer.norm)
            query, key = merge_keys(heads, self._second_moment(layer), self._key_method)
            if transformed:
                self._put(writer, layer, "query", number, query.flatten(0, 2))
            self._put(writer, layer, "key", number, key)

    def _values(self, layer: AttentionLayer, writer: Writer) -> None:
        """Values of a layer, and the output projection where it changes with them."""
        transformed, place = transforms(self._method), self._checkpoint.places[layer.index]["output"]
        # Its columns belong to heads, so all of it is read and written at once.
        weight = self._checkpoint.rows(place.weight) if transformed else ABSENT
        constants = []
        for number, members in enumerate(self._groups(layer)):
            output = ABSENT
            if transformed:
                width = len(members) * layer.group_size * layer.head_dim
                columns = weight[:, number * width : (number + 1) * width]
                output = columns.double().unflatten(1, (len(members), -1, layer.head_dim))
                output = output.permute(1, 2, 0, 3).contiguous()
            value = self._read(layer, "value", number, len(members))
            heads = Heads(ABSENT, ABSENT, value, output, layer.rope, layer.norm, place.bias is not None)
            value, output, constant = merge_values(heads, self._second_moment(layer), self._method)
            if transformed:
                columns.copy_(output.permute(2, 0, 1, 3).flatten(1))
            self._put(writer, layer, "value", number, value)
            constants.append(constant)
        if not transformed:
            return
        if place.weight in writer.entries:
            writer.rows(place.weight, weight)
        if place.bias is not None and place.bias in writer.entries:
            bias, moved = self._checkpoint.rows(place.bias), total_constant(constants)
            writer.rows(place.bias, bias if moved is None else (bias.double() + moved).to(bias.dtype))

    def _groups(self, layer: AttentionLayer) -> list[tuple[int, ...]]:
        return adjacent(layer.num_key_value_heads, self._numbers[layer.index])

    def _second_moment(self, layer: AttentionLayer) -> Tensor:
        """The layer's, kept while it is the last one asked for."""
        if self._moments is None:
            return torch.ones(layer.key.in_features + 1, dtype=torch.float64)
        if self._moment is None or self._moment[0] != layer.index:
            self._moment = None  # frees the last one before the next is read
            self._moment = layer.index, self._moments.second_moment(layer.index)
        return self._moment[1]

    def _read(self, layer: AttentionLayer, name: str, number: int, heads: int) -> Tensor:
        """A group's heads in float64, their bias appended, `(heads, head_dim, m + 1)`."""
        place, count = self._checkpoint.places[layer.index][name], heads * layer.head_dim
        rows = slice(place.rows.start + number * count, place.rows.start + (number + 1) * count)
        weight = self._checkpoint.rows(place.weight, rows)
        found = torch.empty(count, weight.shape[1] + 1, dtype=torch.float64)
        found[:, :-1] = weight
        found[:, -1] = 0 if place.bias is None else self._checkpoint.rows(place.bias, rows)
        return found.view(heads, layer.head_dim, -1)

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
