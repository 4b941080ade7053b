"""Numbers of heads that Transformers' own fields cannot say, in config.json: what `load_pretrained` builds a model by.

    "hf_attnkit": {
        "version": 2,
        "heads": {
            "model": "MixtralForCausalLM",
            "layers": {"model.layers.0.self_attn": {"heads": [6, 3], "numbers": {"num_key_value_groups": 2}}},
            "config": {"num_attention_heads": [8, 6]}
        }
    }

`heads` are query and key/value heads (0 and 0 where a stand-in is left, see `models.without_heads`), `numbers`
attributes of the module that attends (of a list of modules: how many are left), `output` the path of an output
projection outside of it, `shared` those of modules that make something for its heads and for those of other attentions
(MPNet's bias), `config` fields that its forward reads while it runs, before and now. Shapes are not recorded: the
checkpoint has them.

A part of a model that has a config of its own (CLIP's towers, LLaVA's language model) is recorded there, so that it
loads from the whole as well as by itself. `"attn_implementation": "hf_attnkit"` next to it makes Transformers alone
refuse the checkpoint by that name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.kind import NAME
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.whole import configs_in, saved_with
from hf_attnkit.models.without_heads import HEADS_LEFT

KEY, VERSION = "hf_attnkit", 2


def record_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config records of heads; empty where that is nothing.

    Raises:
        ValueError: for a record of a later version.
    """
    key = getattr(config, KEY, None) or {}
    if not isinstance(key, dict) or not isinstance(found := key.get("heads", {}), dict):
        raise ValueError(f"config.{KEY} is damaged: {str(key)[:200]}")
    if found and key.get("version", VERSION) > VERSION:
        raise ValueError(
            f"config.{KEY} has version {key['version']}, and this hf_attnkit knows up to {VERSION}: install a later one"
        )
    return found


def is_marked(model: PreTrainedModel) -> bool:
    """Whether heads of the model, or of a part of it, were changed by what they own, recorded or not."""
    return any("heads" in (getattr(config, KEY, None) or {}) for config in configs_in(model.config))


def record(model: PreTrainedModel, layers: dict[str, dict[str, Any]], undo: Undo) -> None:
    """Note layers in the model's config, and in those of the parts that they are in.

    Args:
        layers: by path in the model: `heads`, `numbers`, perhaps `output`.

    Raises:
        ValueError: for parts that share a config, which could not say of which of them it speaks.
    """
    saved = {id(config) for config in configs_in(model.config)}
    for path, layer in layers.items():
        seen: set[int] = set()
        for prefix, owner in _owners(model, path):
            if id(owner.config) in seen:
                continue
            seen.add(id(owner.config))
            # The outermost part with this config, which is what is loaded from it.
            prefix, owner = next(pair for pair in _owners(model, path)[::-1] if pair[1].config is owner.config)
            _require_own_config(model, prefix.rstrip("."), owner)
            _note(owner, path.removeprefix(prefix), _relative(layer, prefix), undo)
            if id(owner.config) in saved:
                break
    if layers and getattr(model.config, "attn_implementation", None) != NAME:
        undo.set(model.config, "attn_implementation", NAME)
    path, whole = saved_with(model)
    if not any(config is model.config for config in configs_in(whole.config)):  # a copy, which is saved nowhere
        record(whole, {f"{path}.{name}": _inside(layer, f"{path}.") for name, layer in layers.items()}, undo)


def _require_own_config(model: PreTrainedModel, path: str, owner: PreTrainedModel) -> None:
    for name, part in model.named_modules():
        if part is not owner and type(part) is type(owner) and part.config is owner.config:
            raise ValueError(
                f"{path} and {name} are built from one config, which cannot say of which of them heads were removed, "
                "so that the model could not be loaded again; the model is unchanged"
            )


def _owners(model: PreTrainedModel, path: str) -> list[tuple[str, PreTrainedModel]]:
    """The models that a module is in, innermost first, each with the start of the path that leads to it."""
    parts = path.split(".")
    found = []
    for end in range(len(parts) - 1, -1, -1):
        prefix = "".join(f"{part}." for part in parts[:end])
        owner = model.get_submodule(prefix.rstrip("."))
        if isinstance(owner, PreTrainedModel):
            found.append((prefix, owner))
    return found


def _relative(layer: dict[str, Any], prefix: str) -> dict[str, Any]:
    return _with_paths(layer, lambda path: path.removeprefix(prefix))


def _inside(layer: dict[str, Any], prefix: str) -> dict[str, Any]:
    return _with_paths(layer, lambda path: prefix + path)


def _with_paths(layer: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The same with the paths of modules next to the one that attends changed."""
    found = dict(layer)
    if "output" in layer:
        found["output"] = change(layer["output"])
    if "shared" in layer:
        found["shared"] = [change(path) for path in layer["shared"]]
    return found


def _note(owner: PreTrainedModel, path: str, layer: dict[str, Any], undo: Undo) -> None:
    heads = _of_this_model(owner)
    layers = dict(heads.get("layers", {}))
    known = layers.get(path, {})
    numbers = known.get("numbers", {}) | layer.get("numbers", {})
    layers[path] = known | layer | {"numbers": numbers}
    _write(owner.config, heads | {"layers": layers}, undo)


def _of_this_model(owner: PreTrainedModel) -> dict[str, Any]:
    """The record of the model's config, paths counted from this model."""
    heads, name = record_of(owner.config), type(owner).__name__
    if heads.get("model", name) == name:
        return {"model": name} | heads
    inside = [path for path, part in owner.named_modules() if type(part).__name__ == heads["model"]]
    if len(inside) != 1:
        raise ValueError(
            f"heads were removed through a {heads['model']}, whose config this {name} shares; pass that model, so that "
            "the config says of whose layers it speaks"
        )
    layers = {f"{inside[0]}.{path}": _inside(own, f"{inside[0]}.") for path, own in heads["layers"].items()}
    return heads | {"model": name, "layers": layers}


def record_config(config: PreTrainedConfig, fields: dict[str, tuple[int, int]], undo: Undo) -> None:
    """Note fields that were given other numbers, `(before, now)`."""
    heads = record_of(config)
    known = heads.get("config", {})
    new = {name: [known.get(name, [before])[0], now] for name, (before, now) in fields.items()}
    _write(config, heads | {"config": known | new}, undo)


def _write(config: PreTrainedConfig, heads: dict[str, Any], undo: Undo) -> None:
    undo.set(config, KEY, (getattr(config, KEY, None) or {}) | {"version": VERSION, "heads": heads})


def build_by_stock(config: PreTrainedConfig) -> None:
    """Give a loaded config the numbers that its class is to be built with; `build_as_recorded` brings the others."""
    found = list(configs_in(config))
    heads = [record_of(each) for each in found]
    for each, own in zip(found, heads, strict=True):
        for name, (stock, _) in own.get("config", {}).items():
            setattr(each, name, stock)
    swapped = any("layers" in (getattr(each, KEY, None) or {}) for each in found)
    if not swapped:
        for each in found:
            if each._attn_implementation == NAME:
                each._attn_implementation_internal = None


def build_as_recorded(model: PreTrainedModel) -> list[str]:
    """Give a model built by stock numbers those of its configs' records; its parameters stay as they are.

    Returns:
        Paths of the modules whose parameters have the checkpoint's shapes.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    sized: list[str] = []
    parts = _recorded_parts(model)
    for prefix, part in parts:
        heads = record_of(part.config)
        layers: dict[str, dict[str, Any]] = {}
        for path, layer in heads.get("layers", {}).items():
            where = _present(part, path)
            if where is None and heads["model"] != type(part).__name__:
                continue  # a model that was taken out of another has some of its layers
            if where is None:
                raise ValueError(f"config.{KEY} names {path}, which {type(part).__name__} does not have")
            for name, number in layer.get("numbers", {}).items():
                _give(part.get_submodule(where), name, number)
            if "heads" in layer:
                setattr(part.get_submodule(where), HEADS_LEFT, layer["heads"][0])
            layers[where] = dict(layer)
            sized.append(prefix + where)
            if "output" in layer:
                layers[where]["output"] = _present(part, layer["output"])
                sized.append(f"{prefix}{layers[where]['output']}")
            if "shared" in layer:
                layers[where]["shared"] = [_present(part, each) for each in layer["shared"]]
                sized += [f"{prefix}{each}" for each in layers[where]["shared"]]
        if layers:
            heads = heads | {"model": type(part).__name__, "layers": layers}
            setattr(part.config, KEY, getattr(part.config, KEY) | {"heads": heads})
            model.config.attn_implementation = NAME  # building consumed it; saving again needs it
        for name, (_, now) in heads.get("config", {}).items():
            setattr(part.config, name, now)
        _tell_copies(part, heads, {id(each.config) for _, each in parts})
    return sized


def recorded_heads(model: PreTrainedModel) -> tuple[list[nn.Module], list[tuple[int, int]]]:
    """The modules of a built model whose heads were changed, and their numbers of query and key/value heads."""
    modules: list[nn.Module] = []
    heads: list[tuple[int, int]] = []
    for _, part in _recorded_parts(model):
        for path, layer in record_of(part.config).get("layers", {}).items():
            if (where := _present(part, path)) is not None and "heads" in layer:
                modules.append(part.get_submodule(where))
                heads.append((layer["heads"][0], layer["heads"][1]))
    return modules, heads


def _tell_copies(part: PreTrainedModel, heads: dict[str, Any], known: set[int]) -> None:
    """Let the copies that parts of the model have of its config (T5's encoder and decoder) speak of these parts."""
    for path, inner in part.named_modules():
        if not isinstance(inner, PreTrainedModel) or id(inner.config) in known:
            continue
        if record_of(inner.config).get("model") == heads["model"] != type(inner).__name__:
            layers = {
                name.removeprefix(f"{path}."): _relative(layer, f"{path}.")
                for name, layer in heads["layers"].items()
                if name.startswith(f"{path}.")
            }
            own = {"model": type(inner).__name__, "layers": layers, "config": heads.get("config", {})}
            setattr(inner.config, KEY, {"version": VERSION, "heads": own})


def _recorded_parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """For each config with a record, outermost first: the model inside that it speaks of, and the path to that."""
    by_config: dict[int, list[tuple[str, PreTrainedModel]]] = {}
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and record_of(part.config):
            by_config.setdefault(id(part.config), []).append((f"{path}." if path else "", part))
    found = []
    for parts in by_config.values():
        name = record_of(parts[0][1].config).get("model")
        fits = next((pair for pair in parts if type(pair[1]).__name__ == name), None)
        if fits is None and parts[0][1] is model:
            fits = parts[0]  # a model that was taken out of another, or given another head
        if fits is not None:
            found.append(fits)
    return found


def _present(model: PreTrainedModel, path: str) -> str | None:
    """The path of a module, found also where a head was taken off the model or put on."""
    prefix = f"{model.base_model_prefix}."
    for each in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(each)
        except AttributeError:
            continue
        return each
    return None


def _give(module: nn.Module, name: str, number: int) -> None:
    """Set an attribute, given as a path, to a number; of a list of modules, keep so many."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    value = getattr(owner, leaf, None)
    setattr(owner, leaf, nn.ModuleList(list(value)[:number]) if isinstance(value, nn.ModuleList) else number)
