"""A model made of its config alone: of its class and sizes, with weights that are random and take next to no memory.

Every large parameter is a window on one long vector of random numbers, so memory is that of the largest tensor, in
float32. Of a list of layers only as many stay as it takes to have each sort of them:

    40 layers, sorts   a a b a a b ...     3 stay: the last of them is the first of the last sort

A checkpoint that records numbers of heads by module path takes its shapes from its own files, and is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.analysis.describe_attention import AttentionReport, AttentionRow, cache_bytes, describe_attention
from hf_attnkit.analysis.trials import silent
from hf_attnkit.editing.head_record import record_of
from hf_attnkit.editing.heads_before import says_heads_before
from hf_attnkit.loading import load_pretrained, skeleton
from hf_attnkit.models.whole import configs_in

# Windows of different parameters begin so far apart.
_STEP = 64
_INDEX = re.compile(r"(layer|block)?_?(idx|index|id|number|num)")
_QUANTIZED = "its weights are quantized; load the model without quantization"


def inspect_checkpoint(name: str, config: PreTrainedConfig) -> AttentionReport:
    """What `describe_attention` says of a checkpoint's model, without reading its weights where that can be.

    Args:
        name: folder, or name on the hub.
        config: of the checkpoint.

    Raises:
        ValueError: as `load_pretrained` and `describe_attention`.
    """
    dtype = config.dtype or torch.float32
    quantized = getattr(config, "quantization_config", None) is not None
    with silent():
        if says_heads_before(config) or any(record_of(each) for each in configs_in(config)):
            return describe_attention(load_pretrained(name))
        model = weightless(config)
        report = _in_short(model)
    changes: dict[str, Any] = {name: _QUANTIZED for name in ("score", "prune", "convert") if quantized}
    rows = tuple(replace(row, **changes) for row in report.rows)
    targets = () if quantized else report.key_value_heads
    size, named = cache_bytes(rows, dtype), str(dtype).removeprefix("torch.")
    return replace(report, dtype=named, rows=rows, bytes_per_token=size, key_value_heads=targets)


def weightless(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config, with random weights, in evaluation mode and float32.

    Raises:
        ValueError: if the config names no class.
    """
    config = copy.deepcopy(config)
    for each in configs_in(config):
        each.__dict__.pop("quantization_config", None)
        each.dtype = torch.float32
    shapes = {name: tensor.shape for name, tensor in skeleton(copy.deepcopy(config)).named_parameters()}
    largest = max((shape.numel() for shape in shapes.values()), default=0)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(largest + _STEP * len(shapes), generator=generator) * 0.05
    state: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        start = _STEP * number
        values = pool[start : start + shape.numel()].view(shape)
        state[name] = values if len(shape) > 1 else 1 + values if name.endswith("weight") else values.clone()
    model: PreTrainedModel = load_pretrained(None, config=config, state_dict=state)  # type: ignore[arg-type]
    return model.eval()


@dataclass(frozen=True)
class _Shortened:
    """A list of layers of which the first ones stay.

    Attributes:
        path: of the list.
        like: for each layer of the whole list, the number of the first one of its sort.
    """

    path: str
    like: tuple[int, ...]


def _in_short(model: PreTrainedModel) -> AttentionReport:
    """The report, from a few layers of each list where the model runs with fewer."""
    lists = list(_lists(model))
    whole = {found.path: dict(model.get_submodule(found.path)._modules) for found in lists}
    for found in lists:
        layers = model.get_submodule(found.path)
        for number in range(max(found.like) + 1, len(found.like)):
            del layers._modules[str(number)]
    try:
        report = describe_attention(model)
    except ValueError:
        if not lists:
            raise
        for path, modules in whole.items():
            model.get_submodule(path)._modules.update(modules)
        return describe_attention(model)
    return replace(report, rows=_unfolded(report.rows, lists))


def _lists(model: nn.Module) -> Iterator[_Shortened]:
    """The outermost lists of modules that have several of a sort."""
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{each}.") for each in outer):
            continue
        outer.append(path)
        sorts = [_sort(each) for each in module]
        like = tuple(sorts.index(sort) for sort in sorts)
        if len(like) > 1 and max(like) + 1 < len(like):
            yield _Shortened(path, like)


def _sort(layer: nn.Module) -> tuple[Any, ...]:
    """What layers of one sort have in common: shapes, and all plain attributes but their number."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    attributes = tuple(
        (path, name, repr(value))
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if (value is None or isinstance(value, (int, float, str, tuple)) or name.startswith("hf_attnkit"))
        and not _INDEX.fullmatch(name)
    )
    return type(layer), shapes, attributes


def _unfolded(rows: tuple[AttentionRow, ...], lists: list[_Shortened]) -> tuple[AttentionRow, ...]:
    """Rows for the layers that were left out too, each as the one of its sort."""
    found: list[tuple[tuple[bool, int, int, int], AttentionRow]] = []
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        own = next((each for each in lists if row.path.startswith(f"{each.path}.")), None)
        if own is None:
            found.append(((row.is_cross, place, 0, 0), row))
            continue
        number, _, rest = row.path.removeprefix(f"{own.path}.").partition(".")
        start = first.setdefault(f"{own.path} {row.is_cross}", place)
        for other, like in enumerate(own.like):
            if like == int(number):
                path = ".".join(part for part in (own.path, str(other), rest) if part)
                found.append(((row.is_cross, start, other, place), replace(row, path=path)))
    return tuple(row for _, row in sorted(found, key=lambda pair: pair[0]))
