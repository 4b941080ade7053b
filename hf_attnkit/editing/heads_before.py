"""Numbers of heads in configs that were written before `head_record`: read, and put into today's record.

    per_layer_config, num_key_value_heads, layers_without_heads     version 0.1, of the types below
    pruned_heads                                                    Transformers 4

The fields are taken out of the config before its class builds the model, by the numbers that the class knows, and
become a record once the modules are there. A layer that version 0.1 counted as one head and named in
`layers_without_heads` has a stand-in, see `models.without_heads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.common.checks import in_range
from hf_attnkit.editing.head_record import KEY, VERSION, record_of
from hf_attnkit.models.attributes import head_attributes
from hf_attnkit.models.numbered_before import CUT, UNGROUPED, attentions_by_number, output_outside, size_of_heads
from hf_attnkit.models.whole import configs_in

Heads = list[tuple[int, int]]  # of query and key/value heads by layer; (0, 0) for a stand-in

_EMPTY, _PRUNED, _GROUPS = "layers_without_heads", "pruned_heads", "num_key_value_heads"
_OUTPUTS = ("o_proj", "dense", "out_lin")
_NUMBERS = ("num_attention_heads", _GROUPS)


def says_heads_before(config: PreTrainedConfig) -> bool:
    """Whether the config, or one inside it, has numbers of heads that its class does not build."""
    return any(_heads(each) is not None for each in configs_in(config))


def take_heads_before(config: PreTrainedConfig) -> dict[int, Heads]:
    """Take these numbers out of a config and those inside it, by the id of each.

    Raises:
        ValueError: for layers or heads that are not there, and numbers that contradict each other.
    """
    found: dict[int, Heads] = {}
    for each in configs_in(config):
        heads = _heads(each)
        if heads is None:
            continue
        found[id(each)] = heads
        others = _other_overrides(each)
        each.per_layer_config = others or None
        if not others:
            each.__dict__.pop("allow_global_per_layer_attribute_access", None)
        for name in (_EMPTY, _PRUNED):
            each.__dict__.pop(name, None)
        if each.model_type in UNGROUPED:
            each.__dict__.pop(_GROUPS, None)
    return found


def record_heads_before(model: PreTrainedModel, taken: Mapping[int, Heads]) -> None:
    """Record in the configs of a model, and of its parts, what was taken out of them."""
    if not taken:
        return
    done: set[int] = set()
    for part in model.modules():  # from the outside in
        if not isinstance(part, PreTrainedModel) or id(part.config) in done or id(part.config) not in taken:
            continue
        done.add(id(part.config))
        modules = attentions_by_number(part)
        paths = {id(module): path for path, module in part.named_modules()}
        layers: dict[str, dict[str, Any]] = {}
        for module, (heads, groups) in zip(modules or (), taken[id(part.config)], strict=True):
            path = paths[id(module)]
            count, shared = max(heads, 1), max(groups, 1)
            numbers = head_attributes(count, shared, size_of_heads(module))
            known = {name: value for name, value in numbers.items() if type(getattr(module, name, None)) is int}
            if count != shared:
                known["num_key_value_groups"] = count // shared
            layers[path] = {"heads": [heads, groups], "numbers": known}
            if (output := output_outside(part.config.model_type, path)) is not None:
                layers[path]["output"] = output
        heads_of = {"model": type(part).__name__, "layers": layers}
        said = getattr(part.config, KEY, None) or {}
        setattr(part.config, KEY, said | {"version": VERSION, "heads": heads_of})


def require_heads_before(model: PreTrainedModel) -> None:
    """Raise `ValueError` if a loaded model whose config was of then has weights of other numbers of heads."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or part.config.model_type not in CUT:
            continue
        for path, layer in record_of(part.config).get("layers", {}).items():
            if path not in (modules := dict(part.named_modules())):
                continue
            heads, groups = layer["heads"]
            output = layer.get("output") or next(f"{path}.{name}" for name in _OUTPUTS if f"{path}.{name}" in modules)
            found = modules[output].in_features // size_of_heads(modules[path])
            if found != max(heads, 1):
                raise ValueError(
                    f"the weights of {path} do not have the sizes that the config asks for ({heads} query and {groups} "
                    f"key/value heads), but those of {found} query heads; correct the config's numbers of heads"
                )


def _heads(config: PreTrainedConfig) -> Heads | None:
    """The numbers by layer, as such a config says them; `None` where it says nothing that its class does not build."""
    if record_of(config) or config.model_type not in CUT:
        if config.__dict__.get(_PRUNED):
            raise ValueError(
                f"config.{_PRUNED}={config.__dict__[_PRUNED]!r} of Transformers 4 cannot be understood for models of "
                f"type {config.model_type!r}"
            )
        return None
    saved = config.to_dict().get("per_layer_config") or {}
    by_layer = any(name in layer for layer in saved.values() for name in _names(config))
    groups = getattr(config, _GROUPS, None) if config.model_type in UNGROUPED else None
    grouped = groups is not None and groups != config.num_attention_heads
    empty = _without_heads(config)
    if pruned := config.__dict__.get(_PRUNED):
        if by_layer:
            raise ValueError(
                f"config.{_PRUNED}={pruned!r} of Transformers 4 and per_layer_config are both there; remove the one "
                "that does not fit the weights"
            )
        return _pruned(config, pruned)
    if not by_layer and not grouped and not empty:
        return None
    return [(0, 0) if index in empty else _of_layer(config, index) for index in range(config.num_hidden_layers)]


def _of_layer(config: PreTrainedConfig, index: int) -> tuple[int, int]:
    layer = config.per_layer_config[index]
    return layer.num_attention_heads, getattr(layer, _GROUPS, None) or layer.num_attention_heads


def _without_heads(config: PreTrainedConfig) -> frozenset[int]:
    given = getattr(config, _EMPTY, None)
    if given is None:
        return frozenset()
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"config.{_EMPTY}={given!r} must be a list of layers")
    return frozenset(in_range(index, config.num_hidden_layers, "layer", f"config.{_EMPTY}: ") for index in given)


def _pruned(config: PreTrainedConfig, given: Any) -> Heads:
    """What `{layer: [head, ...]}` leaves, counted as before the first pruning."""
    where = f"config.{_PRUNED}={given!r} of Transformers 4"
    if config.model_type not in UNGROUPED:
        raise ValueError(f"{where} cannot be understood for models of type {config.model_type!r}")
    if not isinstance(given, dict) or not all(isinstance(heads, (list, tuple)) for heads in given.values()):
        raise ValueError(f"{where} must be {{layer: [head, ...]}}")
    numbers = [config.num_attention_heads] * config.num_hidden_layers
    for key, heads in given.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        layer = in_range(number, len(numbers), "layer", f"{where}: ")
        gone = {in_range(head, config.num_attention_heads, "head", f"{where}: layer {layer}: ") for head in heads}
        numbers[layer] -= len(gone)
        if len(gone) != len(heads) or not numbers[layer]:
            problem = "names a head twice" if len(gone) != len(heads) else "leaves no head, which cannot be loaded"
            raise ValueError(f"{where}: layer {layer} {problem}")
    return [(number, number) for number in numbers]


def _names(config: PreTrainedConfig) -> set[str]:
    return {*_NUMBERS, str(config.attribute_map.get("num_attention_heads"))}


def _other_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says about other things than heads."""
    saved = config.to_dict().get("per_layer_config") or {}
    numbers = _names(config)
    overrides = {int(index): {k: v for k, v in layer.items() if k not in numbers} for index, layer in saved.items()}
    return {index: layer for index, layer in overrides.items() if layer}
