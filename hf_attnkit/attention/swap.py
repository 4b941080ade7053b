"""Swap the attention of a model's layers, prove that each swapped layer runs it, and swap it back.

`swap_attention`, which can refit as well, is in `refitting.swap_attention`.

The chosen kinds are kept in two places that are written together: on each attention module (what runs)
and in the config (what is saved), under `hf_attnkit`:

    {"base": "sdpa", "layers": {"model.layers.0.self_attn": ["sliding_window", {"window": 64}]}}

with the path of the layer's module; a model of several parts keeps them in the config of the part that has the layer.
`config.json` then also says `"attn_implementation": "hf_attnkit"`, so that Transformers alone, which does not know that
name, refuses the checkpoint instead of running other attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention import saved_kinds
from hf_attnkit.attention.cache_placement import add_hook, remove_hook
from hf_attnkit.attention.call_checks import add_checks, note_handed_down, remove_checks
from hf_attnkit.attention.choose_kinds import STOCK, Spec, Where, check_kind, choose_kinds
from hf_attnkit.attention.consistency import base_of, bases, is_swapped, require_grouping
from hf_attnkit.attention.find_rotation import find_rotations
from hf_attnkit.attention.kernels.rotation import Rotation
from hf_attnkit.attention.kind import ATTRIBUTE, KEPT, NAME, PARAMETERS, ROTATION, Kind, Stock
from hf_attnkit.attention.proof import prove_swap
from hf_attnkit.attention.proof_cached import prove_cached
from hf_attnkit.common.state import plain_mode, replace_state
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.known import part_configs
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.models.whole import saved_with, searched_once


@contextmanager
def swapped(
    model: PreTrainedModel, kind: Spec | Mapping[Where, Spec], layers: Iterable[Where] | None, options: dict[str, Any]
) -> Iterator[Swap]:
    """Make a swap, then run the block; an error in either, also an interruption, puts the model back.

    Args:
        model, kind, layers, options: as of `swap_attention`.

    Raises:
        TypeError, ValueError: as `swap_attention` without its refit.
    """
    with plain_mode():
        whole, whole_layers, kinds = _chosen(model, kind, layers, options)
        with _installed(whole, whole_layers, kinds) as swap:
            transfer = sorted({kind.name for kind in kinds.values() if kind.needs_transfer})
            if transfer:
                warnings.warn(
                    f"{', '.join(transfer)} attention is another function than softmax attention: a model pretrained "
                    "with softmax gives useless output until it is trained with it",
                    stacklevel=4,
                )
            yield swap


@dataclass(frozen=True)
class Swap:
    """A swap that was made.

    Attributes:
        model: the one whose config says what runs; of a part of a model that cannot say it, the whole.
        layers: all of that model.
        swapped: numbers of the layers that were named or chosen.
        before, after: what each of the layers ran, and runs.
    """

    model: PreTrainedModel
    layers: list[AttentionLayer]
    swapped: frozenset[int]
    before: list[Kind | Stock]
    after: list[Kind | Stock]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """All layers run what they ran before, while the block runs."""
        self._run(self.before)
        try:
            yield
        finally:
            self._run(self.after)

    def _run(self, kinds: list[Kind | Stock]) -> None:
        for layer, kind in zip(self.layers, kinds, strict=True):
            setattr(layer.module, ATTRIBUTE, kind)


def check(
    model: PreTrainedModel,
    kind: Spec | Mapping[Where, Spec],
    *,
    layers: Iterable[Where] | None = None,
    **options: Any,
) -> dict[int, Kind]:
    """The kind that `swap_attention` would give to each layer; changes nothing and runs nothing.

    Raises:
        TypeError, ValueError: as `swap_attention`, but for its proof.
    """
    return _chosen(model, kind, layers, options)[2]


def _chosen(
    model: PreTrainedModel, kind: Spec | Mapping[Where, Spec], layers: Iterable[Where] | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[AttentionLayer], dict[int, Kind]]:
    """The model whose config says what runs (the whole, of a part that cannot say it), its layers, and their kinds."""
    path, whole = saved_with(model)
    whole_layers = attention_layers(whole)
    if whole is model:
        return model, whole_layers, choose_kinds(model, whole_layers, kind, layers, options)
    inside = {id(module) for module in model.modules()}
    numbers = [layer.index for layer in whole_layers if id(layer.module) in inside]
    own = [replace(whole_layers[number], index=index) for index, number in enumerate(numbers)]

    def named(where: Where) -> Where:
        return f"{path}.{where}" if isinstance(where, str) else where

    if isinstance(kind, Mapping):
        kind = {named(where): spec for where, spec in kind.items()}
    elif layers is not None and isinstance(layers, Iterable) and not isinstance(layers, str):
        layers = [named(where) for where in layers]
    kinds = choose_kinds(whole, own, kind, layers, options)
    if not is_swapped(whole) and base_of(whole) not in STOCK:
        raise ValueError(
            f"the rest of {type(whole).__name__} would keep {base_of(whole)!r}, which cannot share masks with swapped "
            "layers; load it with attn_implementation='sdpa'"
        )
    return whole, whole_layers, {numbers[index]: found for index, found in kinds.items()}


@plain_mode()
@searched_once()
def restore_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo every `swap_attention`: the model runs the implementation it had before the first one.

    Of a part whose config is the whole's, or a copy of it (BART's and T5's encoders), in all of the whole.

    Raises:
        ValueError: if nothing was swapped, or the earlier implementation cannot run the heads that
            the model has by now.
    """
    given, (_, model) = model, saved_with(model)
    model_layers = attention_layers(model)
    if not is_swapped(model):
        raise ValueError(
            f"{type(model).__name__} has no swapped attention to restore "
            f"(it runs {model.config._attn_implementation!r})"
        )
    heads = [(layer.num_heads, layer.num_key_value_heads) for layer in model_layers]
    require_grouping(
        model, [layer.module for layer in model_layers], heads, [base_of(model, layer) for layer in model_layers]
    )
    before = bases(model)
    model.set_attn_implementation(base_of(model))
    for layer in model_layers:
        if hasattr(layer.module, ATTRIBUTE):
            delattr(layer.module, ATTRIBUTE)
        remove_hook(layer.module)
        _set_parameters(layer.module, None)
    _set_rotations(model_layers, {})
    remove_checks(model)
    for config in part_configs(model):
        config._attn_implementation_internal = before[id(config)]
        saved_kinds.clear(config)
    saved_kinds.unmark_wholes(model)
    return given


@plain_mode()
def install_saved(model: PreTrainedModel) -> None:
    """Put the kinds that a loaded config, and those of parts, name onto the model's modules, with the same proof.

    Raises:
        ValueError: as `swap_attention`.
    """
    if saved_kinds.saved_in(model.config) is None:  # parts of it were swapped alone
        for path, part in list(saved_kinds.saved_parts(model)):
            if path and saved_kinds.saved_in(part.config) is not None:
                install_saved(part)
        return
    model_layers = attention_layers(model)
    kinds = saved_kinds.read(model, model_layers)
    for index, kind in kinds.items():
        check_kind(kind, model_layers[index])
    with _installed(model, model_layers, kinds):
        pass


def saved_kind(model: PreTrainedModel, index: int) -> str:
    """Name of what a layer runs as the config says: a kind, or one of Transformers' own implementations."""
    model_layers = attention_layers(model, adapters=True)  # only looked at
    kind = saved_kinds.read(model, model_layers).get(index)
    return base_of(model, model_layers[index]) if kind is None else kind.name


def add_saved_parameters(model: PreTrainedModel) -> None:
    """Give the modules of a model that is being loaded what their kinds learn, before the weights are read."""
    for module, new in saved_kinds.learned(model):
        like = next(p for p in module.parameters() if p.is_floating_point())
        _set_parameters(module, new.to(device=like.device, dtype=like.dtype))


@contextmanager
def _installed(model: PreTrainedModel, model_layers: list[AttentionLayer], kinds: dict[int, Kind]) -> Iterator[Swap]:
    """Write kinds to modules and config, run the proof, then the block; put everything back if one of them fails."""
    before, had_checks = bases(model), is_swapped(model)
    old_configs = [(config, dict(config.__dict__)) for config in part_configs(model)]
    old_kinds = [getattr(layer.module, ATTRIBUTE, None) for layer in model_layers]
    ran = [old or Stock(base_of(model, layer)) for layer, old in zip(model_layers, old_kinds, strict=True)]
    old_parameters = [(getattr(layer.module, PARAMETERS, None), _kept(layer.module)) for layer in model_layers]
    old_rotations = {layer.index: found for layer in model_layers if (found := getattr(layer.module, ROTATION, None))}
    runs = {layer.index: kinds.get(layer.index, own) for layer, own in zip(model_layers, ran, strict=True)}
    try:
        for layer in model_layers:
            kind = runs[layer.index]
            add_parameters(layer, kind)
            setattr(layer.module, ATTRIBUTE, kind)
            add_hook(layer.module)
        saved_kinds.write(model, model_layers, before)
        model.set_attn_implementation(NAME)
        for layer in model_layers:
            config = getattr(layer.module, "config", None)
            if config is not None and not layer.refusal:
                # Transformers sets it only for classes whose source has a word that it looks for.
                config._attn_implementation_internal = NAME
        saved_kinds.mark_wholes(model)
        swapped = [layer for layer in model_layers if layer.index in kinds]
        _set_rotations(model_layers, find_rotations(model, [each for each in model_layers if _renumbers(each)]))
        inputs = prove_swap(model, model_layers, swapped)
        prove_cached(model, swapped, inputs)
        with quiet(model):
            note_handed_down(model, [layer.module for layer in swapped], inputs)
        add_checks(model)
        yield Swap(model, model_layers, frozenset(kinds), ran, list(runs.values()))
    except BaseException:
        _set_rotations(model_layers, old_rotations)
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
        if not had_checks:
            remove_checks(model)
        for each, state in old_configs:
            replace_state(each, state)
        saved_kinds.unmark_wholes(model)
        raise


def _renumbers(layer: AttentionLayer) -> bool:
    return bool(getattr(getattr(layer.module, ATTRIBUTE, None), "renumber", False))


def _set_rotations(layers: Iterable[AttentionLayer], rotations: Mapping[int, Rotation]) -> None:
    for layer in layers:
        layer.module.__dict__.pop(ROTATION, None)
        if layer.index in rotations:
            layer.module.__dict__[ROTATION] = rotations[layer.index]


def add_parameters(layer: AttentionLayer, kind: Kind | Stock) -> None:
    """Give a layer's module what its kind learns: what it has or had already, if it fits, else the start value.

    Where it has or had a part of that (the same maps, without the gate that is asked for now), the part is taken.

    `load_pretrained` calls this before the weights are read.
    """
    new = None
    if isinstance(kind, Kind):
        new = kind.create_parameters(layer.num_heads, layer.num_key_value_heads, layer.head_dim)
    old = getattr(layer.module, PARAMETERS, None)
    if new is not None and _fits(old, new):
        return
    if new is not None:
        kept, parts = _kept(layer.module), _shared(new, old)
        if kept is not None and _fits(kept, new) and not parts:
            new = kept
        else:
            parts = _shared(new, kept) | parts
        like = next(p for p in layer.module.parameters() if p.is_floating_point())
        if like.is_meta and hasattr(layer.module, "_hf_hook"):
            raise ValueError(
                f"layer {layer.index} is offloaded, so nothing can be added to it that {kind.name!r} learns; load the "
                "model without offloading, swap, save, and load that with hf_attnkit.load_pretrained"
            )
        new = new.to(device=like.device, dtype=like.dtype)
        for name, part in parts.items():
            new.get_submodule(name).load_state_dict(part.state_dict())
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


def _shared(new: nn.Module, earlier: nn.Module | None) -> dict[str, nn.Module]:
    """By name, parts of earlier parameters that fit parts of new ones: the same function, for the same heads."""
    found = {} if earlier is None else dict(earlier.named_children())
    return {name: found[name] for name, part in new.named_children() if _fits(found.get(name), part)}


def _fits(parameters: nn.Module | None, needed: nn.Module) -> bool:
    """Whether these are parameters of the same function for the same numbers of heads."""
    if type(parameters) is not type(needed):
        return False
    found, shapes = ({n: p.shape for n, p in m.state_dict().items()} for m in (parameters, needed) if m is not None)
    return found == shapes
