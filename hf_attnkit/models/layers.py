"""A model's attention layers: modules, projections and numbers of heads, as the model says when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention, is_linear
from hf_attnkit.models.attention_layer import AttentionLayer, OfLength, weight_of
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.projected import Projected
from hf_attnkit.models.without_heads import has_no_heads

__all__ = ["AttentionLayer", "attention_layers", "discovered_layers", "in_running_order", "layers_sharing_a_bias",
           "output_of", "own_key_value_heads", "ownership_of", "projected_layers", "require_parameters",
           "require_plain", "scored_layers", "weight_of", "without_heads"]  # fmt: skip


def attention_layers(model: PreTrainedModel, *, adapters: bool = False) -> list[AttentionLayer]:
    """The attention layers, as the model was seen to run: in calling order, cross-attention after all others.

    Query, key and value are `None`, see `projected_layers`.

    Args:
        adapters: accept a model with PEFT adapters inside: it is looked at and not changed.

    Raises:
        TypeError, ValueError: as `require_plain` and `discover`.
    """
    require_plain(model, adapters=adapters)
    return discovered_layers(model)


def require_plain(model: PreTrainedModel, *, adapters: bool = False) -> None:
    """Raise `TypeError` for what is no `PreTrainedModel`, and `ValueError` for one with PEFT adapters.

    Args:
        adapters: as of `attention_layers`.
    """
    if not adapters and (hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, which are bound to the projections' sizes; change the "
            "model first and add adapters after, or merge them: model = model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers.PreTrainedModel, got {type(model).__name__}; pass the model itself, before "
            "torch.compile, accelerator.prepare or another wrapper"
        )


def discovered_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """As `attention_layers`, of any model.

    Raises:
        TypeError, ValueError: as `discover`.
    """
    found = known.known(model).discovery
    attentions = found.attentions
    outputs = [attention.output for attention in attentions]
    if None in outputs:  # something lies between: only gradients tell
        with suppress(ValueError):  # one that does not run alone; only scores need its output
            outputs = [own.output for own in known.owned(model)]
    layers = [
        _from(model, found.inputs, attention, output) for attention, output in zip(attentions, outputs, strict=True)
    ]
    for layer in layers:
        weight = getattr(layer.output, "weight", None) if layer.is_empty else None
        if isinstance(weight, Tensor) and not weight.is_meta and weight.any():
            raise ValueError(
                f"{layer.name}: the config says that it has no heads, but its attention adds more than a bias; make "
                "the weight of its output projection zero again"
            )
    return layers


def in_running_order(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """The layers as they run: a decoder's cross-attention within its blocks."""
    return sorted(layers, key=lambda layer: layer.attention.order)


def projected_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of a model whose weights may be cut, with their projections, as gradients tell.

    The model runs, and each kind of attention in it runs alone several times, once for as long as the model stays.

    Raises:
        TypeError, ValueError: as `discover`; for adapters; for an attention that does not run alone.
    """
    require_plain(model)
    known.require_runnable(model)
    layers = discovered_layers(model)
    require_parameters(layers)
    parts = zip(layers, known.projections(model), known.owned(model), strict=True)
    return [_projected(layer, found, own) for layer, found, own in parts]


def require_parameters(layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` if another tool computes a weight or bias of a layer's matrix products from others."""
    for layer in layers:
        inside = {f"{layer.name}, {path}": module for path, module in layer.module.named_modules() if is_linear(module)}
        for where, linear in (inside | {f"{layer.name}, its output projection": layer.output}).items():
            for which in ("weight", "bias"):
                parametrized = which in getattr(linear, "parametrizations", {})
                if parametrized or (getattr(linear, which, None) is not None and which not in linear._parameters):
                    raise ValueError(
                        f"{where}: its {which} is computed from other parameters at each call, so rows cannot be cut "
                        "out of it; make it a plain parameter first (torch.nn.utils.prune.remove, remove_weight_norm, "
                        "parametrize.remove_parametrizations), change the model and wrap it then"
                    )


def _projected(layer: AttentionLayer, found: Projected, owned: Ownership) -> AttentionLayer:
    modules = {role: layer.module.get_submodule(own.path) for role, own in found.rows.items()}
    why = f" ({owned.problem})" if owned.problem else ""
    return replace(
        layer,
        query=modules.get("query"),  # type: ignore[arg-type]
        key=modules.get("key"),  # type: ignore[arg-type]
        value=modules.get("value"),  # type: ignore[arg-type]
        num_key_value_heads=owned.num_key_value_heads,
        rope=found.rope,
        norm=found.between_keys,
        row_numbers={role: own.rows.flatten() for role, own in found.rows.items()},
        problems={role: reason + why for role, reason in found.problems.items()},
        between_values=found.between_values,
        other_inputs=found.other_inputs,
        takes_outputs=found.takes_outputs,
        per_head=found.per_head,
    )


def _from(
    model: PreTrainedModel, inputs: Mapping[str, Any], attention: Attention, output: str | None
) -> AttentionLayer:
    """
    Args:
        inputs: under which the model was found to run.
    """
    parts = attention.path.split(".")
    outer = [".".join(parts[:stop]) for stop in range(len(parts), -1, -1)]
    inside = (path for path, above in pairwise(outer)
              if isinstance(model.get_submodule(above), nn.ModuleList))  # fmt: skip
    return AttentionLayer(
        attention.index,
        model.get_submodule(next(inside, attention.path)),
        attention.module,
        query=None,  # type: ignore[arg-type]
        key=None,  # type: ignore[arg-type]
        value=None,  # type: ignore[arg-type]
        output=None if output is None else model.get_submodule(output),  # type: ignore[arg-type]
        num_heads=attention.num_heads,
        num_key_value_heads=attention.num_key_value_heads,
        head_dim=attention.head_dim,
        name=f"layer {attention.index} ({attention.path})",
        is_cross=attention.is_cross,
        position_bias=attention.position_bias,
        saved_as=attention.path,
        value_dim=attention.value_head_dim,
        is_empty=has_no_heads(attention.module),
        attention=attention,
        padding=_fitting(inputs, padding := _padding(model, attention.path), attention.lengths[0]),
        key_padding=_fitting(inputs, _encoder_padding(model) if attention.is_cross else padding, attention.lengths[1]),
        of_length=_of_length(model, attention.path),
    )


def _of_length(model: PreTrainedModel, path: str) -> OfLength | None:
    """See `AttentionLayer`."""
    parts = path.split(".")
    for stop in range(len(parts) - 1, -1, -1):
        part = model.get_submodule(".".join(parts[:stop]))
        if hasattr(part, "_pad_to_window_size"):  # Longformer, on the right
            return lambda length, mask: F.pad(mask, (0, length - mask.shape[1]))
        reduce = getattr(part, "_get_feature_vector_attention_mask", None)
        if reduce is None:
            continue
        if "adapter" in path or hasattr(part.config, "squeeze_factor"):  # fewer positions than the mask is made for
            return None
        before = {"add_adapter": False} if "add_adapter" in inspect.signature(reduce).parameters else {}
        return partial(reduce, **before)  # Wav2Vec2 and its like: from samples to frames
    return None


def _encoder_padding(model: PreTrainedModel) -> str:
    """Which input says which tokens of the other sequence, that of a cross-attention's keys, are padding."""
    if "encoder_attention_mask" in inspect.signature(model.forward).parameters:  # a decoder that is given the sequence
        return "encoder_attention_mask"
    return "attention_mask" if model.main_input_name == "input_ids" else ""


def _fitting(inputs: Mapping[str, Any], padding: str, length: int) -> str:
    """The same, or nothing where the mask was of other positions than the layer's: text next to an image's patches."""
    mask = inputs.get(padding)
    fits = not isinstance(mask, Tensor) or not length or mask.shape[-1] == length
    return padding if fits else ""


def _padding(model: PreTrainedModel, path: str) -> str:
    """Which input tells padding from tokens, of a model of several parts: that of the part that the layer is in."""
    parts = path.split(".")
    inside = [model.get_submodule(".".join(parts[:stop])) for stop in range(len(parts), -1, -1)]
    part = next((each for each in inside if isinstance(each, PreTrainedModel) and "forward" in vars(type(each))), model)
    if part.main_input_name != "input_ids" and model.main_input_name == "input_ids":
        return ""
    if getattr(model.config, "is_encoder_decoder", False) and any("decoder" in name for name in parts):
        return "decoder_attention_mask"
    return "attention_mask"


def scored_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of a model whose heads are to be scored: nothing is cut, so any model will do.

    Raises:
        TypeError, ValueError: as `attention_layers`; for quantized weights.
    """
    layers = attention_layers(model)
    known.require_runnable(model)
    return layers


def without_heads(model: PreTrainedModel, attentions: Sequence[Attention]) -> frozenset[int]:
    """Numbers of the attentions whose one head is a stand-in."""
    return frozenset(each.index for each in attentions if has_no_heads(each.module))


def layers_sharing_a_bias(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Numbers of layers that share a bias of the scores, head by head, and so can only lose the same heads.

    Raises:
        TypeError, ValueError: as `discover`.
    """
    biases = [each.bias for each in known.known(model).attentions if each.bias is not None]
    return list(dict.fromkeys(bias.users for bias in biases if len(bias.users) > 1))


def own_key_value_heads(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[int]:
    """Of each of the model's layers, the key/value heads that have parameters of their own.

    What never calls the interface does not show them, and a module may repeat its keys before it attends. As they
    arrive, where parameters do not tell (quantized weights, a module that does not run alone).
    """
    try:
        return [own.num_key_value_heads for own in known.owned(model)]
    except ValueError:
        return [layer.num_key_value_heads for layer in layers]


def output_of(layer: AttentionLayer) -> nn.Module:
    """The output projection.

    Raises:
        ValueError: if none was found.
    """
    if layer.output is None:
        raise ValueError(
            f"{layer.name}: no matrix product takes its heads' outputs, so what a head adds cannot be told; take a "
            "score of attention alone, such as method='entropy'"
        )
    return layer.output


def ownership_of(model: PreTrainedModel, layer: AttentionLayer) -> Ownership:
    """What belongs to the heads of a layer, from gradients.

    Raises:
        ValueError: if that cannot be told.
    """
    attentions, owned = known.known(model).attentions, known.owned(model)
    return next(own for each, own in zip(attentions, owned, strict=True) if each.module is layer.module)
