"""The new shards of a checkpoint: one layer's projections are read, merged and cut at a time.

A layer's new tensors are those that `OwnedChange` makes in memory, by the same functions: merged heads at full size,
each repeated over its group, of which all rows but those of the first of each group are cut away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attnkit.common.progress import progress_bar
from hf_attnkit.conversion.checkpoints.likeness import Likeness, module_of
from hf_attnkit.conversion.checkpoints.safetensors_stream import DTYPES, Entry, Reader, Writer
from hf_attnkit.conversion.checkpoints.source import Checkpoint
from hf_attnkit.conversion.grouping import adjacent
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.merging import Merging
from hf_attnkit.conversion.methods.table import merge_keys, merge_values, total_constant, transforms
from hf_attnkit.conversion.statistics import StatisticsFile
from hf_attnkit.editing.cut_plan import CutPlan
from hf_attnkit.models.layers import AttentionLayer, weight_of
from hf_attnkit.models.owners import Owners


class Shards:
    """Computes the new tensors of a checkpoint and writes its shards.

    Args:
        numbers: of key/value heads, one for each layer.
        moments: second moments for methods that use them; `None` is the identity.
    """

    def __init__(
        self, checkpoint: Checkpoint, numbers: Sequence[int], merging: Merging, moments: StatisticsFile | None
    ) -> None:
        self._checkpoint = checkpoint
        self._resized: dict[str, Entry] = {}
        self._numbers, self._merging, self._moments = numbers, merging, moments
        self._layer_of: dict[str, Likeness] = {}
        self._last: tuple[int, dict[str, Tensor]] | None = None
        for one, number in zip(checkpoint.small.likenesses, numbers, strict=True):
            if not merging.changes(one.layer, number):
                continue
            keep = self._plan(one, number).by_role()
            for name, owners in self._cut(one):
                tensor = checkpoint.saved[f"{one.path}.{name}"]
                entry = checkpoint.entry(tensor)
                self._resized[tensor] = _with_size(entry, owners.dim, len(owners.kept(keep)))
                self._layer_of[tensor] = one
            for path in self._turned(one):
                for leaf in ("weight", "bias"):
                    if (tensor := checkpoint.saved.get(f"{path}.{leaf}", "")) and tensor not in self._layer_of:
                        self._layer_of[tensor] = one

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

    def _cut(self, one: Likeness) -> list[tuple[str, Owners]]:
        """Parameters that have rows of keys or values, and those rows."""
        return [(name, owners) for name, owners in one.owned.owned.items() if owners.rows.keys() & {"key", "value"}]

    def _plan(self, one: Likeness, number: int) -> CutPlan:
        size = one.layer.num_key_value_heads // number
        firsts = tuple(range(0, one.layer.num_key_value_heads, size))
        return CutPlan(one.mate, one.owned, tuple(range(one.mate.num_heads)), firsts)

    def _turned(self, one: Likeness) -> list[str]:
        """Paths of the modules whose heads get another basis next to the keys and values."""
        paths = []
        if transforms(self._merging.key_method):
            paths.append(self._path(one, "query"))
        if transforms(self._merging.method) and one.output is not None:
            paths.append(one.output)
        return paths

    def _path(self, one: Likeness, role: str) -> str:
        """Path of a projection in the large model."""
        found = getattr(one.layer, role)
        inside = next(path for path, module in one.layer.module.named_modules() if module is found)
        return f"{one.path}.{inside}"

    def _write(self, reader: Reader, writer: Writer) -> None:
        """Fill a shard. A layer that two shards share is computed for each of them."""
        for tensor in reader.entries:
            one = self._layer_of.get(tensor)
            if one is None:
                writer.copy(reader, tensor)
                continue
            if self._last is None or self._last[0] != one.layer.index:
                self._last = None  # frees the last one before the next is read
                self._last = one.layer.index, self._tensors(one)
            writer.rows(tensor, self._last[1][tensor])

    def _tensors(self, one: Likeness) -> dict[str, Tensor]:
        """A layer's new tensors, by the checkpoint's names."""
        modules: dict[str, nn.Linear] = {}

        def loaded(path: str) -> nn.Linear:
            if path not in modules:
                weight, bias = (self._checkpoint.saved.get(f"{path}.{leaf}") for leaf in ("weight", "bias"))
                rows = self._checkpoint.rows
                assert weight is not None
                large = self._checkpoint.model.get_submodule(path)
                modules[path] = module_of(large, rows(weight), None if bias is None else rows(bias))
            return modules[path]

        turned, number = self._turned(one), self._numbers[one.layer.index]
        roles = {role: loaded(self._path(one, role)) for role in ("key", "value")}
        if transforms(self._merging.key_method):
            roles["query"] = loaded(self._path(one, "query"))
        if one.output in turned:
            roles["output"] = loaded(one.output)
        self._merge(one.layer, roles, number)
        found: dict[str, Tensor] = {}
        keep = self._plan(one, number).by_role()
        for name, owners in self._cut(one):
            path, _, leaf = f"{one.path}.{name}".rpartition(".")
            tensor = self._checkpoint.saved[f"{path}.{leaf}"]
            whole = getattr(modules[path], leaf).detach() if path in modules else self._checkpoint.rows(tensor)
            found[tensor] = whole.index_select(owners.dim, owners.kept(keep)).contiguous()
        for path in turned:
            for leaf in ("weight", "bias"):
                tensor = self._checkpoint.saved.get(f"{path}.{leaf}", "")
                if tensor and tensor not in found:
                    found[tensor] = getattr(modules[path], leaf).detach().contiguous()
        return {name: value.to(DTYPES[self._checkpoint.entry(name).dtype]) for name, value in found.items()}

    def _merge(self, layer: AttentionLayer, modules: dict[str, nn.Linear], number: int) -> None:
        """Put merged heads, each repeated over its group, in place of the layer's: a group at a time, in float64."""
        moment, others = self._moment(layer), self._other_moments(layer)
        key_method, method = self._merging.key_method, self._merging.method
        has_bias = layer.output is not None and layer.output.bias is not None and layer.passes_constants
        common = Heads(ABSENT, ABSENT, ABSENT, ABSENT, layer.rope, layer.norm, has_bias, layer.shifts_cancel, **others)
        of_values = moment if common.value_moment is None else common.value_moment
        constants = []
        for members in adjacent(layer.num_key_value_heads, number):
            heads = range(members[0] * layer.group_size, (members[-1] + 1) * layer.group_size)
            query = ABSENT
            if "query" in modules:
                query = _read(layer, "query", modules["query"], heads).unflatten(0, (len(members), -1))
            key = _read(layer, "key", modules["key"], members)
            query, key = merge_keys(replace(common, query=query, key=key), moment, key_method)
            _put(layer, "key", modules["key"], members, key.expand(len(members), -1, -1))
            if "query" in modules:
                _put(layer, "query", modules["query"], heads, query.flatten(0, 1))
            output, columns = ABSENT, None
            if "output" in modules:
                size = layer.value_head_dim
                columns = weight_of(modules["output"])[:, heads.start * size : heads.stop * size]
                output = columns.double().unflatten(1, (len(members), -1, size)).permute(1, 2, 0, 3).contiguous()
            value = _read(layer, "value", modules["value"], members)
            value, output, constant = merge_values(replace(common, value=value, output=output), of_values, method)
            _put(layer, "value", modules["value"], members, value.expand(len(members), -1, -1))
            if columns is not None:
                columns.copy_(output.permute(2, 0, 1, 3).flatten(1))
            constants.append(constant)
        moved = total_constant(constants)
        if moved is not None and "output" in modules and (bias := modules["output"].bias) is not None:
            bias.data = (bias.detach().double() + moved).to(bias.dtype)

    def _moment(self, layer: AttentionLayer) -> Tensor:
        if self._moments is None:
            return torch.ones(weight_of(layer.key).shape[1] + 1, dtype=torch.float64)
        return self._moments.second_moment(layer.index)

    def _other_moments(self, layer: AttentionLayer) -> dict[str, Any]:
        """Second moments of inputs that are not the keys'."""
        if self._moments is not None:
            return {f"{role}_moment": self._moments.other(layer.index, role) for role in ("query", "value")}
        return {
            f"{role}_moment": torch.ones(weight_of(getattr(layer, role)).shape[1] + 1, dtype=torch.float64)
            for role in layer.other_inputs
        }


def _rows(layer: AttentionLayer, role: str, heads: Sequence[int]) -> Tensor:
    """Numbers of the rows of these heads."""
    rows = layer.rows(role)
    numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    size = layer.value_head_dim if role == "value" else layer.head_dim
    return numbers.unflatten(0, (-1, size))[list(heads)].flatten()


def _read(layer: AttentionLayer, role: str, module: nn.Linear, heads: Sequence[int]) -> Tensor:
    """Heads in float64, their bias appended, `(heads, size, m + 1)`."""
    rows, weight = _rows(layer, role, heads), weight_of(module)
    found = torch.empty(len(rows), weight.shape[1] + 1, dtype=torch.float64)
    found[:, :-1] = weight[rows]
    found[:, -1] = 0 if module.bias is None else module.bias.detach()[rows]
    return found.unflatten(0, (len(heads), -1))


def _put(layer: AttentionLayer, role: str, module: nn.Linear, heads: Sequence[int], values: Tensor) -> None:
    """Write heads `(heads, size, m + 1)` over the present ones."""
    rows, weight, flat = _rows(layer, role, heads), weight_of(module), values.flatten(0, 1)
    weight[rows] = flat[:, :-1].to(weight.dtype)
    if module.bias is not None:
        bias: Tensor = module.bias.detach()
        bias[rows] = flat[:, -1].to(bias.dtype)


def _with_size(entry: Entry, dim: int, size: int) -> Entry:
    shape = tuple(size if axis == dim else number for axis, number in enumerate(entry.shape))
    return replace(entry, shape=shape, nbytes=entry.nbytes // entry.shape[dim] * size)
