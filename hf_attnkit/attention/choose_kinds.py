"""From what a user asks of `swap_attention` to the kind of each layer, checked against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_attnkit.attention.consistency import base_of, is_swapped, require_consistent
from hf_attnkit.attention.kind import Kind
from hf_attnkit.attention.table import make_kind
from hf_attnkit.common.checks import in_range
from hf_attnkit.models.layers import AttentionLayer

# Transformers' own implementations that can serve next to ours in one model: their masks are tensors
# that can be made from ours.
STOCK = ("sdpa", "eager")

OF_CACHE = ("cache_dtype", "renumber")  # options that would do nothing where no cache layer of ours is

Spec = str | tuple[str, Mapping[str, Any]]
Where = int | str  # a layer's number, or the path of its module


def choose_kinds(
    model: PreTrainedModel,
    model_layers: list[AttentionLayer],
    given: Spec | Mapping[Where, Spec],
    layers: Iterable[Where] | None,
    options: dict[str, Any],
) -> dict[int, Kind]:
    """The kind of each layer to swap, all of it possible.

    Raises:
        TypeError, ValueError: as `swap_attention`, but for its proof.
    """
    kinds = _plan(model, model_layers, given, layers, options)
    for index, kind in kinds.items():
        check_kind(kind, model_layers[index])
    require_consistent(model, model_layers)
    base = base_of(model)
    if not is_swapped(model) and base not in STOCK and len(kinds) < len(model_layers):
        raise ValueError(
            f"layers {[layer.index for layer in model_layers if layer.index not in kinds]} would keep "
            f"{base!r}, which cannot share masks with swapped layers; swap all layers, or load the model with "
            "attn_implementation='sdpa'"
        )
    return kinds


def _plan(
    model: PreTrainedModel,
    model_layers: list[AttentionLayer],
    given: Spec | Mapping[Where, Spec],
    layers: Iterable[Where] | None,
    options: dict[str, Any],
) -> dict[int, Kind]:
    """The kind of each layer to swap, indices checked."""
    if isinstance(given, Mapping):
        if layers is not None or options:
            other = "layers" if layers is not None else ", ".join(options)
            raise ValueError(f"{other} cannot be given next to a mapping; write {{layer: (name, options)}}")
        specs: dict[Where, Spec] = dict(given)
    else:
        if layers is not None and (not isinstance(layers, Iterable) or isinstance(layers, str)):
            raise TypeError(f"layers={layers!r} must be a list of layer numbers or module paths")
        indices: list[Where] = list(range(len(model_layers)) if layers is None else layers)
        if isinstance(given, str):
            specs = dict.fromkeys(indices, (given, options))
        elif options:
            raise ValueError(f"options are given twice: in {given!r} and as {', '.join(options)}")
        else:
            specs = dict.fromkeys(indices, given)
    if not specs:
        raise ValueError("no layer to swap: layers or the mapping is empty")
    kinds = {}
    for layer, spec in specs.items():
        index = layer_number(model, model_layers, layer)
        named = (spec, {}) if isinstance(spec, str) else spec
        if not (isinstance(named, tuple) and len(named) == 2 and isinstance(named[1], Mapping)):
            raise TypeError(f"layer {index}: {spec!r} is no attention; it must be a name or (name, options)")
        kind = make_kind(named[0], dict(named[1]))
        chosen = layers is not None or isinstance(given, Mapping)
        left_out = (model_layers[index].is_cross and kind.self_attention_only) or model_layers[index].refusal
        if chosen or not left_out:
            kinds[index] = kind
    if not kinds:
        refusals = sorted({layer.refusal for layer in model_layers if layer.refusal})
        raise ValueError(
            f"no attention of {type(model).__name__} (model type {model.config.model_type!r}) can be swapped for this "
            f"kind: {'; '.join(refusals) or 'queries and keys are of two sequences in all of them'}"
        )
    return kinds


def layer_number(model: PreTrainedModel, model_layers: list[AttentionLayer], where: Where) -> int:
    """The number of a layer, given by its number or the path of the module that attends.

    Raises:
        ValueError: if there is no such layer.
    """
    if not isinstance(where, str):
        return in_range(where, len(model_layers), "layer")
    modules = dict(model.named_modules(remove_duplicate=False))
    found = [layer.index for layer in model_layers if layer.module is modules.get(where)]
    if not found:
        known = [path for path, module in modules.items() if any(layer.module is module for layer in model_layers)]
        raise ValueError(
            f"layer {where!r} is no attention of this {type(model).__name__}, which has layers 0 to "
            f"{len(model_layers) - 1}, by path: {', '.join(known)}"
        )
    return found[0]


def check_kind(kind: Kind, layer: AttentionLayer) -> None:
    """Raise `ValueError` if the layer cannot run this kind."""
    if layer.refusal:
        raise ValueError(f"{layer.name} cannot run {kind.name!r}: {layer.refusal}")
    kind.check_heads(layer.num_heads, layer.num_key_value_heads)
    if layer.is_cross and kind.self_attention_only:
        raise ValueError(
            f"{layer.name}: {kind.name!r} needs queries and keys of one sequence, and cross-attention has two; leave "
            "this layer out, or give it 'mha', 'gqa' or 'flash'"
        )
    if cached := [name for name in OF_CACHE if getattr(kind, name, None)]:
        why = _no_cache_of_ours(layer)
        if why:
            raise ValueError(
                f"{layer.name}: {cached[0]}={getattr(kind, cached[0])!r} is about a cache of this kind's own, and {why}"
            )
    if getattr(kind, "renumber", False) and (layer.attention.softcap is not None or layer.attention.has_sinks):
        raise ValueError(
            f"{layer.name}: it caps its scores or has learned sinks, which renumber=True does not take in; use "
            "renumber=False"
        )
    if layer.position_bias and not kind.forms_scores:
        raise ValueError(
            f"{layer.name}: {kind.name!r} forms no scores, so the model's position bias could not be added to them; "
            "use another attention for this model"
        )


def _no_cache_of_ours(layer: AttentionLayer) -> str:
    """Why a layer never has a cache layer of ours, or empty."""
    if layer.is_cross:
        return "cross-attention keeps the encoder's keys; name the decoder's self-attention with layers=[...]"
    if not layer.attention.is_causal:
        return "this attention is not causal and keeps none; leave it out, or name causal layers with layers=[...]"
    if layer.position_bias:
        return "this model's position bias is made for the keys of Transformers' cache; leave it out"
    if layer.attention.window is not None:
        return (
            f"the model keeps a window of its own, {layer.attention.window} tokens; set config.sliding_window to None "
            "before the swap and give a window"
        )
    return ""
