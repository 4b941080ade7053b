"""Note in a model's config what was cut, so that the model can be loaded again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import PARAMETERS
from hf_attnkit.editing.cut_heads import CutHeads
from hf_attnkit.editing.head_record import record, record_config
from hf_attnkit.editing.stock_fields import into_stock_fields
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.checkpoint_shapes import require_reloadable
from hf_attnkit.models.discovery import Discovery
from hf_attnkit.models.owners import Ownership


def require_nothing_learned_by(attentions: Sequence[Attention]) -> None:
    """Raise `ValueError` for a swapped attention that has learned something."""
    for each in attentions:
        if isinstance(getattr(each.module, PARAMETERS, None), nn.Module):
            raise ValueError(
                f"{each.path}: its swapped attention has learned something for each head, which would not fit others; "
                "change the heads first, then swap the attention"
            )


def save_cut(
    model: PreTrainedModel,
    found: Discovery,
    owned: Sequence[Ownership],
    cut: CutHeads,
    before: Sequence[tuple[int, int]],
) -> None:
    """Say in the configs what was cut, in Transformers' own fields where they can; `cut.undo()` takes it back.

    Args:
        found, owned: of the model before the cut.
        before: its numbers of query and key/value heads.

    Raises:
        ValueError: for what no checkpoint, or no config of this class, can say. The caller then undoes.
    """
    layers: dict[str, dict[str, Any]] = {}
    for attention, own in zip(found.attentions, owned, strict=True):
        if attention.index not in cut.heads:
            continue
        state = attention.module.state_dict()
        if lost := [name for name in own.owned if name not in state and name in dict(attention.module.named_buffers())]:
            raise ValueError(
                f"{attention.path}.{lost[0]} has something for each head and is no part of a checkpoint, so the model "
                "could not be loaded again; the model is unchanged"
            )
        layer: dict[str, Any] = {"heads": list(cut.heads[attention.index]), "numbers": cut.numbers[attention.path]}
        if own.output is not None and not own.output.startswith(f"{attention.path}."):
            layer["output"] = own.output
        if attention.bias is not None and attention.bias.rows:
            layer["shared"] = sorted({name.rpartition(".")[0] for name in attention.bias.rows})
        layers[attention.path] = layer
    record(model, layers, cut.steps)
    by_config: dict[int, tuple[Any, dict[str, tuple[int, int]]]] = {}
    for config, name, old, now in cut.config:
        by_config.setdefault(id(config), (config, {}))[1][name] = old, now
    for config, fields in by_config.values():
        record_config(config, fields, cut.steps)
    heads = [cut.heads.get(index, pair) for index, pair in enumerate(before)]
    if not into_stock_fields(model, found, cut, heads):
        _say_size_of_heads(model, found, cut)
    beside = [path for own in layers.values() for path in (own.get("output"), *own.get("shared", ())) if path]
    require_reloadable(model, [*layers, *beside])
    try:
        type(model.config).from_dict(model.config.to_dict())
    except Exception as error:  # whatever a config's own checks say
        raise ValueError(
            f"{type(model.config).__name__} does not accept what it would save, so that the model could not be loaded "
            f"again ({str(error)[:200]}); the model is unchanged"
        ) from error


def _say_size_of_heads(model: PreTrainedModel, found: Discovery, cut: CutHeads) -> None:
    """Say the size of a head where the number of heads no longer implies it, so that a loaded model rotates as before.

    Raises:
        ValueError: if its class does not read it.
    """
    size = max((each.head_dim for each in found.attentions if each.index in cut.heads), default=0)
    unsaid = [each for each in cut.config if getattr(each[0], "head_dim", None) is None]
    if not unsaid or not any(2 * shape[0] <= size for shape in _rotations(model).values()):
        return
    config, name, old, now = unsaid[0]
    for other, *_ in unsaid:
        cut.steps.set(other, "head_dim", size)
    try:
        with torch.device("meta"):
            built = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
        same = _rotations(built) == _rotations(model)
    except Exception:  # whatever a class says that is built from such numbers
        same = False
    if not same:
        raise ValueError(
            f"{type(config).__name__} has no head_dim: when the model is loaded, its rotary embedding would be made "
            f"for heads of another size, since {name} is {now} and was {old}; the model is unchanged"
        )


def _rotations(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if "inv_freq" in name}


def cache_bytes_of(found: Discovery, numbers: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Bytes of keys and values per token with these numbers of (query, key/value) heads; a stand-in is one."""
    return sum(
        max(1, groups) * (each.head_dim + each.value_head_dim) * itemsize
        for each, (_, groups) in zip(found.attentions, numbers, strict=True)
    )
