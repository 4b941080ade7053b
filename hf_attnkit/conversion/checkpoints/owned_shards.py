"""The new shards of a checkpoint of any model: one layer's projections are read, merged and cut at a time.

What a layer's new tensors are is what `OwnedChange` would make of them in memory, by the same functions: merged heads
at full size, each repeated over its group, and then all rows but those of the first of each group cut away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_attnkit.conversion import heads as of_layer
from hf_attnkit.conversion.checkpoints.likeness import Likeness, module_of
from hf_attnkit.conversion.checkpoints.safetensors_stream import DTYPES, Entry, Reader, Writer
from hf_attnkit.conversion.checkpoints.shards import Shards
from hf_attnkit.conversion.checkpoints.source import Checkpoint
from hf_attnkit.conversion.grouping import adjacent
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.merging import Merging
from hf_attnkit.conversion.methods.table import transforms
from hf_attnkit.conversion.owned_change import LayerMerge
from hf_attnkit.conversion.statistics import StatisticsFile
from hf_attnkit.editing import projections
from hf_attnkit.editing.cut_plan import CutPlan
from hf_attnkit.models.layers import AttentionLayer, weight_of
from hf_attnkit.models.owners import Owners


class OwnedShards(Shards):
    """Computes the new tensors of a checkpoint and writes its shards.

    Args:
        numbers: of key/value heads, one for each layer.
        moments: second moments for methods that use them; `None` is the identity.
    """

    def __init__(
        self, checkpoint: Checkpoint, numbers: Sequence[int], merging: Merging, moments: StatisticsFile | None
    ) -> None:
        super().__init__(checkpoint)
        self._numbers, self._merging, self._moments = numbers, merging, moments
        self._layer_of: dict[str, Likeness] = {}
        self._last: tuple[int, dict[str, Tensor]] | None = None
        for one, number in zip(checkpoint.likenesses, numbers, strict=True):
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
        inside = next(path for path, module in one.mate.module.named_modules() if module is found)
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
        modules: dict[str, nn.Module] = {}

        def loaded(path: str) -> nn.Module:
            if path not in modules:
                weight, bias = (self._checkpoint.saved.get(f"{path}.{leaf}") for leaf in ("weight", "bias"))
                rows = self._checkpoint.rows
                assert weight is not None
                large = self._checkpoint.model.get_submodule(path)
                modules[path] = module_of(large, rows(weight), None if bias is None else rows(bias))
            return modules[path]

        turned = self._turned(one)
        parts: dict[str, nn.Module | None] = {role: loaded(self._path(one, role)) for role in ("key", "value")}
        parts["query"] = loaded(self._path(one, "query")) if transforms(self._merging.key_method) else None
        parts["output"] = loaded(one.output) if one.output is not None and one.output in turned else None
        number = self._numbers[one.layer.index]
        layer = replace(one.layer, **parts)  # type: ignore[arg-type]
        moment = self._moment(one.layer)
        present = self._with_others(one.layer, of_layer.read(layer))
        present = replace(present, output_bias=self._has_output_bias(one))
        groups = adjacent(len(present.key), number)
        merged = self._merging.merge(present, groups, moment)
        new = merged.heads
        kept = replace(
            new,
            query=new.query if transforms(self._merging.key_method) else ABSENT,
            output=new.output if transforms(self._merging.method) else ABSENT,
        )
        change = LayerMerge(layer, kept, merged.constant, tuple(tuple(group) for group in groups))
        for edit in projections.whole(change.edits):
            projections.apply(edit)
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

    def _has_output_bias(self, one: Likeness) -> bool:
        layer = one.layer
        return layer.output is not None and layer.output.bias is not None and layer.passes_constants

    def _moment(self, layer: AttentionLayer) -> Tensor:
        if self._moments is None:
            return torch.ones(weight_of(layer.key).shape[1] + 1, dtype=torch.float64)
        return self._moments.second_moment(layer.index)

    def _with_others(self, layer: AttentionLayer, heads: Heads) -> Heads:
        if self._moments is not None:
            query, value = (self._moments.other(layer.index, role) for role in ("query", "value"))
            return replace(heads, query_moment=query, value_moment=value)
        found = {
            f"{role}_moment": torch.ones(weight_of(getattr(layer, role)).shape[1] + 1, dtype=torch.float64)
            for role in layer.other_inputs
        }
        return replace(heads, **found)  # type: ignore[arg-type]


def _with_size(entry: Entry, dim: int, size: int) -> Entry:
    shape = tuple(size if axis == dim else number for axis, number in enumerate(entry.shape))
    return replace(entry, shape=shape, nbytes=entry.nbytes // entry.shape[dim] * size)
