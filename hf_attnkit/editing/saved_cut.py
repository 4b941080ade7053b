"""Note in a model's config what was cut, so that the model can be loaded again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def require_no_adapters(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model with PEFT adapters."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, which are bound to the projections' sizes; change the "
            "model first and add adapters after, or merge them: model = model.merge_and_unload()"
        )


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
    size = max((each.head_dim for each in found.attentions if each.index in cut.heads), default=0)
    rotates = any("inv_freq" in name and 2 * len(buffer) <= size for name, buffer in model.named_buffers())
    for config, name, old, now in cut.config:
        if rotates and getattr(config, "head_dim", None) is None:
            raise ValueError(
                f"{type(config).__name__} has no head_dim: when the model is loaded, its rotary embedding would be "
                f"made for heads of another size, since {name} is {now} and was {old}; the model is unchanged"
            )
        by_config.setdefault(id(config), (config, {}))[1][name] = old, now
    for config, fields in by_config.values():
        record_config(config, fields, cut.steps)
    into_stock_fields(model, found, cut, [cut.heads.get(index, pair) for index, pair in enumerate(before)])
    beside = [path for own in layers.values() for path in (own.get("output"), *own.get("shared", ())) if path]
    require_reloadable(model, [*layers, *beside])
    try:
        type(model.config).from_dict(model.config.to_dict())
    except Exception as error:  # whatever a config's own checks say
        raise ValueError(
            f"{type(model.config).__name__} does not accept what it would save, so that the model could not be loaded "
            f"again ({str(error)[:200]}); the model is unchanged"
        ) from error


def cache_bytes_of(found: Discovery, numbers: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Bytes of keys and values per token with these numbers of (query, key/value) heads; a stand-in is one."""
    return sum(
        max(1, groups) * (each.head_dim + each.value_head_dim) * itemsize
        for each, (_, groups) in zip(found.attentions, numbers, strict=True)
    )
