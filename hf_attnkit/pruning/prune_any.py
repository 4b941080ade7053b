"""Remove heads from a model whose heads are found by running it: `cut_heads`, and a record of what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import PARAMETERS
from hf_attnkit.common.checks import in_range
from hf_attnkit.editing.cut_heads import CutHeads, cut_heads
from hf_attnkit.editing.head_record import record, record_config
from hf_attnkit.editing.last_change import record_change
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import Discovery, discover
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships
from hf_attnkit.pruning.report import PruningReport

Heads = Mapping[int | str, Iterable[int]]


def prune_discovered(model: PreTrainedModel, heads: Heads, probe: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Remove heads, by an attention's number in calling order or its path; as `prune_heads`.

    Raises:
        TypeError, ValueError: as `prune_heads`; the model is then unchanged.
    """
    require_plain_adapters(model)
    found = discover(model, probe)
    removed = by_index(heads, found.attentions)
    if not removed:
        raise ValueError("no head to remove: heads is empty")
    require_plain(model, [found.attentions[index] for index in removed])
    owned = ownerships(model, found.attentions)
    cut = cut_heads(model, removed, found, owned)
    try:
        save_cut(model, found, owned, cut)
    except BaseException:
        cut.undo()
        raise
    record_change(model, _report(model, found, owned, cut, removed))
    return model


def by_index(heads: Heads, attentions: Sequence[Attention]) -> dict[int, list[int]]:
    """`{attention: [head, ...]}` by number, attentions without a head left out.

    Raises:
        TypeError, ValueError: for anything else than a mapping of attentions, each named once, to heads.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads={heads!r} must be a mapping {{attention: [head, ...]}}")
    paths = {each.path: each.index for each in attentions}
    found: dict[int, list[int]] = {}
    for key, given in heads.items():
        if isinstance(key, str) and key not in paths:
            raise ValueError(f"no attention has the path {key!r}; there are {', '.join(paths)}")
        index = paths[key] if isinstance(key, str) else in_range(key, len(attentions), "layer")
        if index in found:
            raise ValueError(f"layer {index} ({attentions[index].path}) is named twice, by number and by path")
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layer {index}: {given!r} must be a list of heads")
        found[index] = list(given)
    return {index: given for index, given in found.items() if given}


def require_plain_adapters(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model with PEFT adapters."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, which are bound to the projections' sizes; change the "
            "model first and add adapters after, or merge them: model = model.merge_and_unload()"
        )


def require_plain(model: PreTrainedModel, attentions: Sequence[Attention]) -> None:
    """Raise `ValueError` where a cut would not be saved: what a swapped attention learned, buffers made in code."""
    for each in attentions:
        if isinstance(getattr(each.module, PARAMETERS, None), nn.Module):
            raise ValueError(
                f"{each.path}: its swapped attention has learned something for each head, which would not fit fewer; "
                "remove heads first, then swap the attention"
            )


def save_cut(model: PreTrainedModel, found: Discovery, owned: Sequence[Ownership], cut: CutHeads) -> None:
    """Note in the model's config what was cut, so that `load_pretrained` builds it.

    Raises:
        ValueError: for what no checkpoint can say.
    """
    layers: dict[str, dict[str, Any]] = {}
    for attention, own in zip(found.attentions, owned, strict=True):
        if attention.index not in cut.heads:
            continue
        module, state = attention.module, attention.module.state_dict()
        if lost := [name for name in own.owned if name not in state and _buffer(module, name)]:
            raise ValueError(
                f"{attention.path}.{lost[0]} has something for each head and is no part of a checkpoint, so the model "
                "could not be loaded again; the model is unchanged"
            )
        layer: dict[str, Any] = {
            "heads": list(cut.heads[attention.index]),
            "numbers": cut.numbers[attention.path],
        }
        if own.output is not None and not own.output.startswith(f"{attention.path}."):
            layer["output"] = own.output
        layers[attention.path] = layer
    record(model, layers, cut.steps)
    by_config: dict[int, tuple[Any, dict[str, tuple[int, int]]]] = {}
    for config, name, before, now in cut.config:
        by_config.setdefault(id(config), (config, {}))[1][name] = before, now
    for config, fields in by_config.values():
        record_config(config, fields, cut.steps)
    try:
        type(model.config).from_dict(model.config.to_dict())
    except Exception as error:  # whatever a config's own checks say
        raise ValueError(
            f"{type(model.config).__name__} does not accept these numbers of heads, so that the model could not be "
            f"loaded again ({str(error)[:200]}); the model is unchanged"
        ) from error


def _buffer(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_buffers())


def _report(
    model: PreTrainedModel,
    found: Discovery,
    owned: Sequence[Ownership],
    cut: CutHeads,
    removed: Mapping[int, Sequence[int]],
) -> PruningReport:
    before = [(each.num_heads, own.num_key_value_heads) for each, own in zip(found.attentions, owned, strict=True)]
    after = [cut.heads.get(index, pair) for index, pair in enumerate(before)]
    sizes = [(each.head_dim + each.value_head_dim) * model.dtype.itemsize for each in found.attentions]
    bytes_before, bytes_after = (
        sum(groups * size for (_, groups), size in zip(pairs, sizes, strict=True)) for pairs in (before, after)
    )
    gone = {index: tuple(sorted(map(int, heads))) for index, heads in sorted(removed.items())}
    return PruningReport(tuple(before), tuple(after), gone, None, bytes_before, bytes_after)
