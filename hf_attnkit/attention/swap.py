"""Swap the attention of a model's layers, prove that each swapped layer runs it, and swap it back.

The chosen kinds are kept in two places that are written together: on each attention module (what runs)
and in the config (what is saved), under `hf_attnkit`:

    {"base": "sdpa", "layers": {"0": ["sliding_window", {"window": 64}]}}

`config.json` then also says `"attn_implementation": "hf_attnkit"`, so that Transformers alone, which
does not know that name, refuses the checkpoint instead of running other attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.cache_placement import add_hook, remove_hook
from hf_attnkit.attention.call_checks import add_checks, note_handed_down, remove_checks
from hf_attnkit.attention.choose_kinds import Spec, check_kind, choose_kinds
from hf_attnkit.attention.consistency import is_swapped, require_grouping
from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.kind import ATTRIBUTE, KEPT, NAME, PARAMETERS, Kind, Stock
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.table import make_kind
from hf_attnkit.common import options as kind_options
from hf_attnkit.common.checks import in_range
from hf_attnkit.common.state import evaluation_mode, plain_mode, replace_state
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.models.probe import input_device, probe_inputs


def swap_attention(
    model: PreTrainedModel,
    kind: Spec | Mapping[int, Spec],
    *,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Run another kind of attention in the model's layers.

    The swap is proved by a forward pass over four tokens (or an empty image): if any of the layers did
    not run its new kind, the model is restored and an error raised.

    Args:
        model: a model of a supported family; changed in place.
        kind: a name of `available_attentions()`, or a mapping `{layer index: name or (name, options)}`.
        layers: with one name, the layers to swap; by default all that it makes sense for: kinds that
            need queries and keys of one sequence leave cross-attention out. Other layers keep what
            they run. Layers are numbered through encoder self-attention, decoder self-attention,
            decoder cross-attention.
        options: the kind's options, for example `window=64`; with a mapping they are in the mapping.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: unknown kind or option, layer out of range, unsupported family, or a
            model whose attention does not go through Transformers' attention interface. The model
            is then unchanged.
    """
    with plain_mode():
        model_layers = attention_layers(model)
        base, kinds = choose_kinds(model, model_layers, kind, layers, options)
        _install(model, model_layers, base, kinds)

    transfer = sorted({kind.name for kind in kinds.values() if kind.needs_transfer})
    if transfer:
        warnings.warn(
            f"{', '.join(transfer)} attention is another function than softmax attention: a model pretrained with "
            "softmax gives useless output until it is trained with it",
            stacklevel=2,
        )
    return model


def check(
    model: PreTrainedModel,
    kind: Spec | Mapping[int, Spec],
    *,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> dict[int, Kind]:
    """The kind that `swap_attention` would give to each layer; changes nothing and runs nothing.

    Raises:
        TypeError, ValueError: as `swap_attention`, but for its proof.
    """
    return choose_kinds(model, attention_layers(model), kind, layers, options)[1]


@plain_mode()
def restore_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo every `swap_attention`: the model runs the implementation it had before the first one.

    Raises:
        ValueError: if nothing was swapped, or the earlier implementation cannot run the heads that
            the model has by now.
    """
    model_layers = attention_layers(model)
    if not is_swapped(model):
        raise ValueError(
            f"{type(model).__name__} has no swapped attention to restore "
            f"(it runs {model.config._attn_implementation!r})"
        )
    heads = [(layer.num_heads, layer.num_key_value_heads) for layer in model_layers]
    base = model.config.hf_attnkit["base"]
    require_grouping(model, heads, [base] * len(heads))
    model.set_attn_implementation(base)
    for layer in model_layers:
        if hasattr(layer.module, ATTRIBUTE):
            delattr(layer.module, ATTRIBUTE)
        remove_hook(layer.module)
        _set_parameters(layer.module, None)
    remove_checks(model)
    for config in _configs(model):
        # What the key says of removed heads stays, and what makes plain from_pretrained refuse them.
        left = {k: v for k, v in (config.__dict__.pop("hf_attnkit", None) or {}).items() if k not in ("base", "layers")}
        if left:
            config.hf_attnkit = left
        if "heads" not in left:
            # Plain from_pretrained consumes this key, so a model that it loaded does not have it.
            config.__dict__.pop("attn_implementation", None)
    return model


@plain_mode()
def install_saved(model: PreTrainedModel) -> None:
    """Put the kinds that a loaded config names onto the model's modules, with the same proof.

    Raises:
        ValueError: as `swap_attention`.
    """
    model_layers = attention_layers(model)
    kinds = saved_kinds(model.config)
    for index, kind in kinds.items():
        check_kind(kind, model_layers[in_range(index, len(model_layers), "layer")])
    _install(model, model_layers, model.config.hf_attnkit["base"], kinds)


def saved_kinds(config: PreTrainedConfig) -> dict[int, Kind]:
    """The kinds that a config names, by layer.

    Raises:
        ValueError: for an unknown name or option.
    """
    saved = getattr(config, "hf_attnkit", None) or {}
    return {int(index): make_kind(name, options) for index, (name, options) in saved.get("layers", {}).items()}


def saved_kind(model: PreTrainedModel, index: int) -> str:
    """Name of what a layer runs as the config says: a kind, or one of Transformers' own implementations."""
    name: str = model.config._attn_implementation
    if is_swapped(model):
        name = model.config.hf_attnkit["layers"].get(str(index), [model.config.hf_attnkit["base"]])[0]
    return name


def _install(model: PreTrainedModel, model_layers: list[AttentionLayer], base: str, kinds: dict[int, Kind]) -> None:
    """Write kinds to modules and config, run the proof, and put everything back if it fails."""
    config, old_configs = model.config, [(config, dict(config.__dict__)) for config in _configs(model)]
    old_kinds = [getattr(layer.module, ATTRIBUTE, None) for layer in model_layers]
    old_parameters = [(getattr(layer.module, PARAMETERS, None), _kept(layer.module)) for layer in model_layers]
    saved: dict[str, Any] = {"base": base, "layers": {}}
    try:
        for layer in model_layers:
            kind = kinds.get(layer.index) or getattr(layer.module, ATTRIBUTE, None) or Stock(base)
            add_parameters(layer, kind)
            setattr(layer.module, ATTRIBUTE, kind)
            add_hook(layer.module)
            if isinstance(kind, Kind):
                saved["layers"][str(layer.index)] = [kind.name, kind_options.changed(kind)]
        config.hf_attnkit = (getattr(config, "hf_attnkit", None) or {}) | saved
        config.attn_implementation = NAME  # a plain key of config.json; the private one is not saved
        model.set_attn_implementation(NAME)
        _prove(model, [layer for layer in model_layers if layer.index in kinds])
        add_checks(model)
    except BaseException:
        for layer, old, (parameters, kept) in zip(model_layers, old_kinds, old_parameters, strict=True):
            _set_parameters(layer.module, parameters)
            layer.module.__dict__.pop(KEPT, None)
            if kept is not None:
                layer.module.__dict__[KEPT] = kept
            if old is not None:
                setattr(layer.module, ATTRIBUTE, old)
            elif hasattr(layer.module, ATTRIBUTE):
                delattr(layer.module, ATTRIBUTE)
            if old is None:
                remove_hook(layer.module)
        for each, state in old_configs:
            replace_state(each, state)
        raise


def add_parameters(layer: AttentionLayer, kind: Kind | Stock) -> None:
    """Give a layer's module what its kind learns: what it has or had already, if it fits, else the start value.

    `load_pretrained` calls this before the weights are read.
    """
    new = None
    if isinstance(kind, Kind):
        new = kind.create_parameters(layer.num_heads, layer.num_key_value_heads, layer.head_dim)
    old = getattr(layer.module, PARAMETERS, None)
    if new is not None and _fits(old, new):
        return
    if new is not None:
        kept = _kept(layer.module)
        new = kept if kept is not None and _fits(kept, new) else new
        like = next(p for p in layer.module.parameters() if p.is_floating_point())
        if like.is_meta and hasattr(layer.module, "_hf_hook"):
            raise ValueError(
                f"layer {layer.index} is offloaded, so nothing can be added to it that {kind.name!r} learns; load the "
                "model without offloading, swap, save, and load that with hf_attnkit.load_pretrained"
            )
        new = new.to(device=like.device, dtype=like.dtype)
    _set_parameters(layer.module, new)


def _set_parameters(module: nn.Module, parameters: nn.Module | None) -> None:
    """Others than these are kept aside, in case the module runs their kind again."""
    old = getattr(module, PARAMETERS, None)
    if old is not None and old is not parameters:
        module.__dict__[KEPT] = old  # not as a submodule: it is neither trained nor saved
        delattr(module, PARAMETERS)
    if parameters is not None:
        if _kept(module) is parameters:
            del module.__dict__[KEPT]
        setattr(module, PARAMETERS, parameters)


def _kept(module: nn.Module) -> nn.Module | None:
    return module.__dict__.get(KEPT)


def _fits(parameters: nn.Module | None, needed: nn.Module) -> bool:
    """Whether these are parameters of the same function for the same numbers of heads."""
    if type(parameters) is not type(needed):
        return False
    found, shapes = ({n: p.shape for n, p in m.state_dict().items()} for m in (parameters, needed) if m is not None)
    return found == shapes


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The model's config and those of its parts; T5's encoder and decoder have copies."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    return list(configs.values())


def _prove(model: PreTrainedModel, swapped: list[AttentionLayer]) -> None:
    """Run small inputs through the model and check that each swapped layer ran through `NAME`."""
    if input_device(model).type == "meta":
        raise ValueError(
            "the model is on the meta device, so the swap cannot be proved by running it; load the weights first "
            "(hf_attnkit.load_pretrained builds a swapped checkpoint on its devices)"
        )
    called: set[int] = set()

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        called.add(id(module))

    inputs = probe_inputs(model)
    with torch.no_grad(), evaluation_mode(model), observe(note):
        model.base_model(**inputs)
        note_handed_down(model, [layer.module for layer in swapped], inputs)
    missing = [layer.index for layer in swapped if id(layer.module) not in called]
    if missing:
        raise ValueError(
            f"layers {missing} of {type(model).__name__} never called the attention interface, so swapping it has no "
            "effect on them; the model is unchanged"
        )
