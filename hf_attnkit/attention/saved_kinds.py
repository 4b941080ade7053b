"""Where a model keeps which kinds its layers run: in its config, and in those of its parts.

    config.text_config.hf_attnkit = {"version": 2, "base": "sdpa", "layers": {"layers.0.self_attn": ["flash", {}]}}

A layer is named by its module's path within the part whose config has the entry: the innermost part with a config of
its own that is saved inside the model's. So a part that is saved alone, and a model one of whose parts was swapped
alone, both say what runs. A kind that learns something adds the numbers of heads `[num_heads, num_key_value_heads,
head_dim]` behind its options. Version 0.1 named the layers of some types by number, see `models.numbered_before`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.kind import ATTRIBUTE, NAME, PARAMETERS, Kind
from hf_attnkit.attention.table import make_kind
from hf_attnkit.common import options as kind_options
from hf_attnkit.common.checks import in_range
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.models.numbered_before import attentions_by_number, head_numbers
from hf_attnkit.models.whole import configs_in, enclosing

KEY = "hf_attnkit"
VERSION = 2


def saved_in(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a config itself says of kinds; `None` where it says nothing of them."""
    found = getattr(config, KEY, None) or {}
    return found if "layers" in found else None


def clear(config: PreTrainedConfig) -> None:
    """Say nothing of kinds any more; what the key says of removed heads stays, for which Transformers refuses it."""
    found = config.__dict__.pop(KEY, None) or {}
    left = {name: value for name, value in found.items() if name not in ("base", "layers")}
    if "heads" in left:
        setattr(config, KEY, left)
    if not left.get("heads"):
        # Plain from_pretrained consumes this key, so a model that it loaded does not have it.
        config.__dict__.pop("attn_implementation", None)


def _put(config: PreTrainedConfig, base: str) -> None:
    """Begin to say what runs; what the key says of removed heads stays."""
    heads = {name: value for name, value in (getattr(config, KEY, None) or {}).items() if name == "heads"}
    setattr(config, KEY, {"version": VERSION} | heads | {"base": base, "layers": {}})
    config.attn_implementation = NAME  # a plain key of config.json; the private one is not saved


def write(model: PreTrainedModel, layers: Sequence[AttentionLayer], bases: Mapping[int, str]) -> None:
    """Say in the configs what the modules run.

    Args:
        bases: by the id of each part's config, the implementation that it ran before the first swap.
    """
    base = bases[id(model.config)]
    _put(model.config, base)
    parts = [(path, part) for path, part in saved_parts(model) if path]
    for _, part in parts:
        clear(part.config)
        if bases[id(part.config)] != base:
            _put(part.config, bases[id(part.config)])
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers:
        kind = getattr(layer.module, ATTRIBUTE)
        owner, name = model, layer.saved_as
        for path, part in parts:  # from the outside in: the last is the innermost
            if paths[id(layer.module)].startswith(f"{path}."):
                owner, name = part, paths[id(layer.module)].removeprefix(f"{path}.")
        if saved_in(owner.config) is None:
            _put(owner.config, base)
        if isinstance(kind, Kind):
            entry: list[Any] = [kind.name, kind_options.changed(kind)]
            if getattr(layer.module, PARAMETERS, None) is not None:
                entry.append([layer.num_heads, layer.num_key_value_heads, layer.head_dim])
            owner.config.hf_attnkit["layers"][name] = entry


def mark_wholes(model: PreTrainedModel) -> None:
    """Say in the configs of models that this one is a part of that a part of them was swapped.

    Plain `from_pretrained` gives all parts of a model one implementation, so that it would load the whole without the
    swap, and say nothing. With the mark it refuses, by the name that it does not know.
    """
    for whole in wholes(model):
        if saved_in(whole.config) is None:
            _put(whole.config, whole.config._attn_implementation)


def unmark_wholes(model: PreTrainedModel) -> None:
    """Undo `mark_wholes` where no other part is swapped."""
    for whole in wholes(model):
        inside = [saved for each in configs_in(whole.config) if (saved := saved_in(each)) is not None]
        if whole.config._attn_implementation != NAME and not any(saved["layers"] for saved in inside):
            clear(whole.config)


def wholes(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that this one is a part of, with a config of its own inside theirs."""
    return [
        whole
        for _, whole in enclosing(model)
        if whole.config is not model.config and any(each is model.config for each in configs_in(whole.config))
    ]


def saved_parts(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model and its parts that have configs of their own inside the model's, from the outside in; with paths."""
    inside, done = set(map(id, configs_in(model.config))), set()
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and id(part.config) in inside and id(part.config) not in done:
            done.add(id(part.config))
            yield path, part


def is_saved(config: PreTrainedConfig) -> bool:
    """Whether the config, or one inside it, names kinds."""
    return any(saved_in(each) is not None for each in configs_in(config))


def restore_names(config: PreTrainedConfig) -> None:
    """`from_pretrained` consumed the implementation's name; saving again needs it."""
    for each in configs_in(config):
        if getattr(each, KEY, None) is not None:
            each.attn_implementation = NAME


def read(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> dict[int, Kind]:
    """The kinds that the configs name, by the layer's number.

    Raises:
        ValueError: for an unknown name or option, or a layer that is not there.
    """
    numbers = {id(layer.module): layer.index for layer in layers}
    kinds = {}
    for part, name, entry in _entries(model):
        module = _module(part, name)
        if id(module) not in numbers:
            raise ValueError(f"the config names a kind for {name!r}, where {type(part).__name__} has no attention")
        kinds[numbers[id(module)]] = make_kind(entry[0], entry[1])
    return kinds


def learned(model: PreTrainedModel) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The attention modules named by path whose kinds learn something, with what that is, at its start value."""
    for part, name, entry in _entries(model):
        if len(entry) > 2:
            new = make_kind(entry[0], entry[1]).create_parameters(*entry[2])
            if new is not None:
                yield _module(part, name), new


def _entries(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, str, Sequence[Any]]]:
    for _, part in saved_parts(model):
        saved: Mapping[str, Any] = saved_in(part.config) or {"layers": {}}
        if saved.get("version", 1) not in (1, VERSION):
            raise ValueError(
                f"config.{KEY} has version {saved['version']!r} and this is version {VERSION}; update hf_attnkit"
            )
        paths: dict[int, str] = {}
        for name, entry in saved["layers"].items():
            if not str(name).isdecimal() or (modules := attentions_by_number(part)) is None:
                yield part, str(name), entry
                continue
            paths = paths or {id(module): path for path, module in part.named_modules()}
            module = modules[in_range(int(name), len(modules), "layer")]
            yield part, paths[id(module)], [*entry, head_numbers(module)]


def _module(part: PreTrainedModel, path: str) -> nn.Module:
    """The module of this path, also where the part was saved as the inner model of another, or the other way round.

    Raises:
        ValueError: if there is none.
    """
    modules = dict(part.named_modules(remove_duplicate=False))
    if path in modules:
        return modules[path]
    found = [name for name in modules if name and (f".{name}".endswith(f".{path}") or f".{path}".endswith(f".{name}"))]
    if not found:
        raise ValueError(f"the config names a kind for {path!r}, which {type(part).__name__} does not have")
    return modules[max(found, key=len)]
