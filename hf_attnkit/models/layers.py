"""A model's attention layers: modules, projections and numbers of heads, checked against each other."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.models import known
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.attention_layer import AttentionLayer, weight_of
from hf_attnkit.models.attributes import head_attributes
from hf_attnkit.models.config_heads import WITHOUT_HEADS, config_heads, layers_without_heads
from hf_attnkit.models.families import FAMILIES, Family, family_of, require_plain
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.projected import Projected
from hf_attnkit.models.rotary_pairs import Rope
from hf_attnkit.models.without_heads import has_no_heads

__all__ = ["AttentionLayer", "attention_layers", "check_heads", "discovered_layers", "editable_layers",
           "in_running_order", "in_table", "layers_sharing_a_bias", "output_of", "ownership_of",
           "projected_layers", "scored_layers", "weight_of", "without_heads"]  # fmt: skip


def attention_layers(model: PreTrainedModel, *, adapters: bool = False) -> list[AttentionLayer]:
    """The attention layers, first to last.

    Of a family of the table with the numbers of heads from the config; of any other model as discovery finds them, in
    calling order, with `None` for query, key and value.

    Args:
        adapters: as of `family_of`; the projections may then be PEFT's modules.

    Raises:
        TypeError, ValueError: as `family_of` and `discover`.
    """
    if not in_table(model):
        require_plain(model, adapters=adapters)
        return discovered_layers(model)
    family, empty = family_of(model, adapters=adapters), layers_without_heads(model.config)
    layers: list[AttentionLayer] = []
    for index, layer in enumerate(model.base_model.get_submodule(family.layers)):
        num_heads, num_key_value_heads = config_heads(model.config, index)
        module = layer.get_submodule(family.attention)
        parts = {name: layer.get_submodule(getattr(family, name)) for name in ("query", "key", "value", "output")}
        head_dim = getattr(module, family.head_dim)
        layers.append(AttentionLayer(
            index, layer, module, **parts, num_heads=num_heads, num_key_value_heads=num_key_value_heads,
            head_dim=head_dim, name=f"layer {index}", fused=family.fused, rope=_rope(family, model.config, head_dim),
            norm=next((name for name in _KEY_NORMS if hasattr(module, name)), ""), is_empty=index in empty,
            saved_as=str(index),
        ))  # fmt: skip
    return layers


def in_table(model: PreTrainedModel) -> bool:
    """Whether the table says where the attention is; the cross-attention of a decoder alone it does not know.

    A model with code of its own may call its type as one of the table and keep its layers elsewhere.
    """
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None) or "")
    # Recorded numbers of heads are of modules that the table does not know to cut.
    recorded = bool((getattr(config, "hf_attnkit", None) or {}).get("heads"))
    if family is None or recorded or getattr(config, "add_cross_attention", False):
        return False
    try:
        getattr(model, "base_model", model).get_submodule(family.layers)
    except AttributeError:
        return False
    return True


def discovered_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of any model, as it was seen to run: in calling order, cross-attention after all others.

    Raises:
        TypeError, ValueError: as `discover`.
    """
    attentions = known.known(model).attentions
    outputs = [attention.output for attention in attentions]
    if None in outputs:  # something lies between: only gradients tell
        with suppress(ValueError):  # one that does not run alone; only scores need its output
            outputs = [own.output for own in known.owned(model)]
    layers = [_from(model, attention, output) for attention, output in zip(attentions, outputs, strict=True)]
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
    return sorted(layers, key=lambda layer: layer.index if layer.attention is None else layer.attention.order)


def projected_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The layers of `discovered_layers` with their projections, as gradients tell, also of models of the table.

    The model runs, and each kind of attention in it runs alone several times, once for as long as the model stays.

    Raises:
        TypeError, ValueError: as `discover`; for adapters; for an attention that does not run alone.
    """
    require_plain(model)
    known.require_runnable(model)
    projections, owned = known.projections(model), known.owned(model)
    parts = zip(discovered_layers(model), projections, owned, strict=True)
    return [_projected(layer, found, own) for layer, found, own in parts]


def _projected(layer: AttentionLayer, found: Projected, owned: Ownership) -> AttentionLayer:
    modules = {role: layer.module.get_submodule(own.path) for role, own in found.rows.items()}
    why = f" ({owned.problem})" if owned.problem else ""
    return replace(
        layer,
        query=modules.get("query"),  # type: ignore[arg-type]
        key=modules.get("key"),  # type: ignore[arg-type]
        value=modules.get("value"),  # type: ignore[arg-type]
        num_key_value_heads=owned.num_key_value_heads,
        fused=len({id(module) for module in modules.values()}) < len(modules),
        rope=found.rope,
        norm=found.between_keys,
        row_numbers={role: own.rows.flatten() for role, own in found.rows.items()},
        problems={role: reason + why for role, reason in found.problems.items()},
        between_values=found.between_values,
        other_inputs=found.other_inputs,
        takes_outputs=found.takes_outputs,
        per_head=found.per_head,
    )


def _from(model: PreTrainedModel, attention: Attention, output: str | None) -> AttentionLayer:
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
        padding=_fitting(model, padding := _padding(model, attention.path), attention.lengths[0]),
        key_padding=_fitting(model, _encoder_padding(model) if attention.is_cross else padding, attention.lengths[1]),
    )


def _encoder_padding(model: PreTrainedModel) -> str:
    """Which input says which tokens of the other sequence, that of a cross-attention's keys, are padding."""
    if "encoder_attention_mask" in inspect.signature(model.forward).parameters:  # a decoder that is given the sequence
        return "encoder_attention_mask"
    return "attention_mask" if model.main_input_name == "input_ids" else ""


def _fitting(model: PreTrainedModel, padding: str, length: int) -> str:
    """The same, or nothing where the mask was of other positions than the layer's: text next to an image's patches."""
    mask = known.known(model).discovery.inputs.get(padding)
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
        TypeError, ValueError: as `attention_layers`; for a model of the table as `editable_layers`.
    """
    if in_table(model):
        return editable_layers(model)
    layers = attention_layers(model)
    known.require_runnable(model)
    return layers


def without_heads(model: PreTrainedModel, attentions: Sequence[Attention]) -> frozenset[int]:
    """Numbers of the attentions whose one head is a stand-in."""
    if in_table(model):
        return layers_without_heads(model.config)
    return frozenset(each.index for each in attentions if has_no_heads(each.module))


def layers_sharing_a_bias(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Numbers of layers that share a bias of the scores, head by head, and so can only lose the same heads.

    Raises:
        TypeError, ValueError: as `discover`.
    """
    if in_table(model):
        return []
    biases = [each.bias for each in known.known(model).attentions if each.bias is not None]
    return list(dict.fromkeys(bias.users for bias in biases if len(bias.users) > 1))


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


# What attention modules call a norm of the keys.
_KEY_NORMS = ("k_norm", "k_layernorm")


def _rope(family: Family, config: PreTrainedConfig, head_dim: int) -> Rope | None:
    if not family.rope:
        return None
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return Rope(family.rope, int(head_dim * factor))


def editable_layers(model: PreTrainedModel, *, skeleton: bool = False) -> list[AttentionLayer]:
    """The attention layers of a model whose weights may be cut, with their projections.

    Args:
        skeleton: the model is one of the table and on the meta device on purpose, its weights are elsewhere.

    Raises:
        TypeError, ValueError: as `projected_layers`; for a model of the table as `attention_layers`, and for weights
            that are on the meta device, quantized or wrapped, or whose sizes disagree with the config.
    """
    if not in_table(model):
        return projected_layers(model)
    layers = attention_layers(model)
    for layer in layers:
        for name in ("query", "key", "value", "output"):
            linear = getattr(layer, name)
            _require_own_parameters(layer, name, linear)
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
                raise ValueError(
                    f"layer {layer.index}: the {name} projection is a "
                    f"{type(linear).__module__}.{type(linear).__name__} and not a plain nn.Linear; load the model "
                    "without quantization (for GGUF: gguf_file=..., which dequantizes) and without adapters"
                )
            if linear.weight.is_meta and not skeleton:
                raise ValueError(
                    f"layer {layer.index}: the {name} projection is on the meta device, so there are no weights to "
                    "change; load them first (from_pretrained with a device_map that does not offload)"
                )
    check_heads(layers)
    return layers


def _require_own_parameters(layer: AttentionLayer, name: str, linear: nn.Module) -> None:
    """Raise `ValueError` if another tool computes the projection's weight or bias, or spreads it over devices."""
    parametrized = getattr(linear, "parametrizations", {})
    for which in ("weight", "bias"):
        computed = which in parametrized or (
            getattr(linear, which, None) is not None and which not in linear._parameters and not _is_quantized(linear)
        )
        kind = type(linear._parameters.get(which))
        if computed or (isinstance(linear, nn.Linear) and kind.__module__.startswith("torch.distributed")):
            how = (
                "computed from other parameters at each call" if computed else f"a {kind.__name__}, spread over devices"
            )
            raise ValueError(
                f"{layer.name}: the {which} of the {name} projection is {how}, so rows cannot be cut out of it; make "
                "it a plain parameter first (torch.nn.utils.prune.remove, remove_weight_norm, "
                "parametrize.remove_parametrizations; without FSDP), change the model and wrap it then"
            )


def _is_quantized(linear: nn.Module) -> bool:
    return type(linear).__module__ not in (nn.Linear.__module__, "torch.nn.utils.parametrize")


def check_heads(layers: Sequence[AttentionLayer]) -> None:
    """Check that config, weights and module attributes agree.

    Raises:
        ValueError: naming the first layer and projection that disagrees.
    """
    for layer in layers:
        width, kv_width = layer.num_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        inputs = [layer.query] if layer.fused else [layer.query, layer.key, layer.value]
        found = [*(linear.out_features for linear in inputs), layer.output.in_features]
        shapes = [*(linear.weight.shape[0] for linear in inputs), layer.output.weight.shape[1]]
        expected = [width + 2 * kv_width, width] if layer.fused else [width, kv_width, kv_width, width]
        parts = "query with key and value, output" if layer.fused else "query, key, value, output"
        if found != expected or shapes != expected:
            raise ValueError(
                f"layer {layer.index}: the config says {layer.num_heads} query and {layer.num_key_value_heads} "
                f"key/value heads of size {layer.head_dim}, which needs projections of {tuple(expected)} features "
                f"({parts}), but the weights have {tuple(shapes)}; correct the config or load with "
                "hf_attnkit.load_pretrained"
            )
        if layer.is_empty and (layer.num_heads > 1 or (not layer.output.weight.is_meta and layer.output.weight.any())):
            raise ValueError(
                f"layer {layer.index}: the config says that it has no heads ({WITHOUT_HEADS}), but its attention adds "
                f"more than a bias; if it is to have heads again, take it out of config.{WITHOUT_HEADS}"
            )
        if layer.num_heads % layer.num_key_value_heads:
            raise ValueError(
                f"layer {layer.index}: {layer.num_heads} query heads do not divide into "
                f"{layer.num_key_value_heads} groups"
            )
        for name, value in head_attributes(layer.num_heads, layer.num_key_value_heads, layer.head_dim).items():
            if getattr(layer.module, name, value) != value:
                raise ValueError(
                    f"layer {layer.index}: the attention module's {name} is {getattr(layer.module, name)} but config "
                    f"and weights say {value}"
                )
