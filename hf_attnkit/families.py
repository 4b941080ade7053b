"""The one table of model families, and what is read from and written to a model with its help.

A family says where a model keeps its attention layers and where a layer keeps its query, key, value
and output projections. Numbers of heads are read from the config (Transformers' own fields,
`per_layer_config` where layers differ) and checked against the weights; `with_heads` and
`set_attributes` are the only places that write them.

A layer may have lost all of its heads. Transformers' attention classes cannot run without one: they shape by
`view(*shape, -1, head_dim)`, which has no answer for zero elements, and the cache takes its length from the keys of
layer 0. So such a layer keeps a stand-in, one head whose weights are zero: it adds nothing, gets no gradient, and
runs, caches, saves and loads as any head does. The config counts it as one head, and names the layer in
`layers_without_heads`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Stack:
    """One list of layers, each with one attention. `layers` is a path from the base model, the others from a layer.

    Attributes:
        layers: the list of layers.
        attention: the module whose forward calls the attention interface.
        query, key, value, output: the projections.
        head_dim: name of the attention module's attribute with the size of a head.
        name: what messages call the stack, in families that have several.
        num_heads: the config's field, where it is not the same for all layers of the model.
        fused: `query`, `key` and `value` are one `nn.Linear`, whose rows stand in this order.
        is_cross: whether queries and keys come from two sequences.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    head_dim: str = "head_dim"
    name: str = ""
    num_heads: str = "num_attention_heads"
    is_cross: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Family:
    """How the models of a family keep attention.

    Attributes:
        stacks: where the attention layers are. They are numbered through all stacks in this order; a
            model may lack some (the encoder or decoder of an encoder-decoder by itself).
        has_key_value_heads: whether the family's config class knows `num_key_value_heads`. Where it
            does not, Transformers cannot rebuild grouped heads and `load_pretrained` does.
        has_head_dim: whether the family's classes read `head_dim` from the config. Where they do not,
            Transformers cannot rebuild fewer heads and `load_pretrained` does.
        rope: how the rotary embedding pairs the components of a head: "half" (component f with f + half
            of them, as Llama) or "interleaved" (2f with 2f + 1, as GPT-J); empty without one. The share
            that is rotated is the config's `partial_rotary_factor`.
        position_bias: whether the model passes a bias of the scores, the keyword `position_bias`.
        reads_config: whether the attention's forward takes numbers of heads from the model's config, so that
            all layers must have the same.
        fixed: why the heads cannot be edited; empty where they can.
    """

    stacks: tuple[Stack, ...]
    has_key_value_heads: bool = False
    has_head_dim: bool = False
    rope: str = ""
    position_bias: bool = False
    reads_config: bool = False
    fixed: str = ""


def _stack(layers: str, attention: str, projections: str, **others: Any) -> Stack:
    """A stack whose attention modules hold the projections `"query key value output"` themselves."""
    query, key, value, output = (f"{attention}.{name}" for name in projections.split())
    return Stack(layers, attention, query, key, value, output, **others)


_BERT = Family((Stack(
    layers="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    head_dim="attention_head_size",
),))  # fmt: skip
_DISTILBERT = Family((_stack("transformer.layer", "attention", "q_lin k_lin v_lin out_lin",
                             head_dim="attention_head_size"),))  # fmt: skip
_LLAMA = Family((_stack("layers", "self_attn", "q_proj k_proj v_proj o_proj"),),
                has_key_value_heads=True, has_head_dim=True, rope="half")  # fmt: skip
_PHI = Family((_stack("layers", "self_attn", "q_proj k_proj v_proj dense"),),
              has_key_value_heads=True, has_head_dim=True, rope="half")  # fmt: skip
_PHI3 = Family((_stack("layers", "self_attn", "qkv_proj qkv_proj qkv_proj o_proj", fused=True),),
               has_key_value_heads=True, has_head_dim=True, rope="half", reads_config=True)  # fmt: skip
_STABLELM = Family((_stack("layers", "self_attn", "q_proj k_proj v_proj o_proj"),),
                   has_key_value_heads=True, rope="half")  # fmt: skip
_COHERE = Family((_stack("layers", "self_attn", "q_proj k_proj v_proj o_proj"),),
                 has_key_value_heads=True, has_head_dim=True, rope="interleaved")  # fmt: skip
_VIT = Family((_stack("layers", "attention", "q_proj k_proj v_proj o_proj"),), has_head_dim=True)
_GPT2 = Family((_stack("h", "attn", "c_attn c_attn c_attn c_proj"),),
               fixed="query, key and value are one fused projection (c_attn)")  # fmt: skip
_GPT_NEOX = Family((_stack("layers", "attention", "query_key_value query_key_value query_key_value dense",
                           head_dim="head_size"),),
                   fixed="query, key and value of each head are rows of one fused projection, head by head, which its "
                         "forward cuts into three equal parts")  # fmt: skip

_ENCODER_DECODER = "an encoder-decoder's config keeps the numbers of heads of encoder and decoder in fields of its own"
_T5 = Family(
    (
        _stack("encoder.block", "layer.0.SelfAttention", "q k v o", head_dim="key_value_proj_dim",
               name="encoder self-attention"),
        _stack("decoder.block", "layer.0.SelfAttention", "q k v o", head_dim="key_value_proj_dim",
               name="decoder self-attention"),
        _stack("decoder.block", "layer.1.EncDecAttention", "q k v o", head_dim="key_value_proj_dim",
               name="decoder cross-attention", is_cross=True),
    ),
    position_bias=True,
    fixed=_ENCODER_DECODER,
)  # fmt: skip
_BART = Family(
    (
        _stack("encoder.layers", "self_attn", "q_proj k_proj v_proj out_proj",
               name="encoder self-attention", num_heads="encoder_attention_heads"),
        _stack("decoder.layers", "self_attn", "q_proj k_proj v_proj out_proj",
               name="decoder self-attention", num_heads="decoder_attention_heads"),
        _stack("decoder.layers", "encoder_attn", "q_proj k_proj v_proj out_proj",
               name="decoder cross-attention", num_heads="decoder_attention_heads", is_cross=True),
    ),
    fixed=_ENCODER_DECODER,
)  # fmt: skip

# config.model_type -> family
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "stablelm": _STABLELM,
    "phi": _PHI,
    "phi3": _PHI3,
    "cohere": _COHERE,
    "glm": _COHERE,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "t5": _T5,
    "bart": _BART,
    "vit": _VIT,
}

_NEVER_CALLS = "its attention accepts an implementation's name and never calls Transformers' attention interface"
_OWN_CLASSES = "it chooses among attention classes of its own and never calls Transformers' attention interface"
# config.model_type -> why no attention can be swapped in
REFUSED: dict[str, str] = {
    "bloom": _NEVER_CALLS,
    "deberta": _NEVER_CALLS,
    "deberta-v2": _NEVER_CALLS,
    "falcon": _OWN_CLASSES,
    "gptj": _OWN_CLASSES,
}


@dataclass(frozen=True)
class Rope:
    """How a layer's keys are rotated between projection and product.

    Attributes:
        pairing: "half" or "interleaved", see `Family`.
        size: the first so many components of a head are rotated, the others are not.
    """

    pairing: str
    size: int

    def pairs(self) -> tuple[list[int], list[int]]:
        """Indices of the first and of the second component of each rotated pair."""
        if self.pairing == "half":
            return list(range(self.size // 2)), list(range(self.size // 2, self.size))
        return list(range(0, self.size, 2)), list(range(1, self.size, 2))


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: number of the layer, counted through all stacks of the family.
        name: what messages call it: "layer 3", or "layer 9 (decoder cross-attention 1)".
        block: the model's layer that it is part of, whose output the next block takes first.
        module: the module whose forward calls the attention interface.
        query, key, value, output: the projections; `nn.Linear` in the layers of `editable_layers`.
        num_heads, num_key_value_heads, head_dim: as the config says.
        is_empty: whether its one head is a stand-in; see the top of this file.
        is_cross: whether queries and keys come from two sequences.
        position_bias: whether the module passes a bias of the scores.
        fused: whether query, key and value are one module; `rows` tells them apart.
        rope: how keys are rotated, or `None`.
        norm: name of the module that normalises keys between projection and product, or empty.
    """

    index: int
    block: nn.Module
    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    name: str = ""
    is_cross: bool = False
    position_bias: bool = False
    fused: bool = False
    rope: Rope | None = None
    norm: str = ""
    is_empty: bool = False

    @property
    def heads(self) -> range:
        """Numbers of its query heads; none in a layer whose one head is a stand-in."""
        return range(0 if self.is_empty else self.num_heads)

    def rows(self, name: str) -> slice:
        """The rows of "query", "key", "value" or "output" in its module."""
        if not self.fused or name == "output":
            return slice(0, getattr(self, name).weight.shape[0])
        width, kv_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        start = {"query": 0, "key": width, "value": width + kv_width}[name]
        return slice(start, start + (width if name == "query" else kv_width))

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_key_value_heads


def family_of(model: PreTrainedModel, *, adapters: bool = False) -> Family:
    """The model's row of the table.

    Args:
        adapters: accept a model with PEFT adapters inside: it is looked at and not changed.

    Raises:
        TypeError: if it is no `PreTrainedModel` (compiled, wrapped for training, or PEFT).
        ValueError: if its family is refused or not in the table, or it has adapters or cross-attention
            that the table does not know.
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
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        remedy = "" if reason else ". A family is one row in hf_attnkit/families.py"
        raise ValueError(
            f"models of type {model_type!r} ({type(model).__name__}) are not supported{reason}; supported: "
            f"{', '.join(FAMILIES)}{remedy}"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"{type(model).__name__} has cross-attention (config.add_cross_attention=True), which is not supported; "
            "load the model without it"
        )
    return FAMILIES[model_type]


def _stacks(model: PreTrainedModel, adapters: bool = False) -> list[Stack]:
    """The family's stacks that the model has.

    Raises:
        ValueError: if it has none: a part of a model (`model.encoder`).
    """
    modules = {name for name, _ in model.base_model.named_modules()}
    stacks = [stack for stack in family_of(model, adapters=adapters).stacks if stack.layers in modules]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no layers where models of type {model.config.model_type!r} keep them; pass "
            "the whole model, not a part of it"
        )
    return stacks


def attention_layers(model: PreTrainedModel, *, adapters: bool = False) -> list[AttentionLayer]:
    """The attention layers, first to last, with the numbers of heads from the config.

    Args:
        adapters: as of `family_of`; the projections may then be PEFT's modules.

    Raises:
        TypeError, ValueError: as `family_of`; ValueError for a part of a model.
    """
    family, empty = family_of(model, adapters=adapters), layers_without_heads(model.config)
    layers: list[AttentionLayer] = []
    for stack in _stacks(model, adapters):
        for position, layer in enumerate(model.base_model.get_submodule(stack.layers)):
            if family.fixed:
                num_heads = num_key_value_heads = getattr(model.config, stack.num_heads)
            else:
                num_heads, num_key_value_heads = config_heads(model.config, position)
            module, index = layer.get_submodule(stack.attention), len(layers)
            parts = {name: layer.get_submodule(getattr(stack, name)) for name in ("query", "key", "value", "output")}
            layers.append(AttentionLayer(
                index, layer, module, **parts, num_heads=num_heads, num_key_value_heads=num_key_value_heads,
                head_dim=getattr(module, stack.head_dim),
                name=f"layer {index}" + (f" ({stack.name} {position})" if stack.name else ""),
                is_cross=stack.is_cross, position_bias=family.position_bias, fused=stack.fused,
                rope=_rope(family, model.config, getattr(module, stack.head_dim)),
                norm=next((name for name in _KEY_NORMS if hasattr(module, name)), ""),
                is_empty=index in empty,
            ))  # fmt: skip
    return layers


# What attention modules call a norm of the keys.
_KEY_NORMS = ("k_norm", "k_layernorm")


def _rope(family: Family, config: PreTrainedConfig, head_dim: int) -> Rope | None:
    if not family.rope:
        return None
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return Rope(family.rope, int(head_dim * factor))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs go; images enter through a convolution, tokens through an embedding."""
    return next(model.get_input_embeddings().parameters()).device


def probe_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Small inputs for `model.base_model` under which every one of its attention layers runs."""
    config, device, stacks = model.config, input_device(model), _stacks(model)
    if model.base_model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, config.num_channels, height, width, dtype=model.dtype, device=device)}
    tokens = torch.zeros(1, 4, dtype=torch.long, device=device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if any(stack.is_cross for stack in stacks):
        inputs["use_cache"] = False  # Transformers sizes a decoder's cache by the encoder's number of layers
        if stacks == list(family_of(model).stacks):
            inputs["decoder_input_ids"] = tokens[:, :3]
        else:  # a decoder alone attends to what its caller hands over
            inputs["encoder_hidden_states"] = torch.zeros(1, 3, config.hidden_size, dtype=model.dtype, device=device)
    return inputs


def editable_layers(model: PreTrainedModel, *, skeleton: bool = False) -> list[AttentionLayer]:
    """The attention layers of a model whose weights may be cut.

    Args:
        skeleton: the model is on the meta device on purpose, its weights are elsewhere.

    Raises:
        TypeError, ValueError: as `family_of`, for a family whose heads are fixed, and for weights that
            are on the meta device, quantized or wrapped, or whose sizes disagree with the config.
    """
    layers = attention_layers(model)
    if family_of(model).fixed:
        raise ValueError(
            f"heads of {model.config.model_type!r} models ({type(model).__name__}) can be neither scored, merged nor "
            f"removed: {family_of(model).fixed}; their attention can be swapped"
        )
    for layer in layers:
        for name in ("query", "key", "value", "output"):
            linear = getattr(layer, name)
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
        for name, value in _attributes(layer.num_heads, layer.num_key_value_heads, layer.head_dim).items():
            if getattr(layer.module, name, value) != value:
                raise ValueError(
                    f"layer {layer.index}: the attention module's {name} is {getattr(layer.module, name)} but config "
                    f"and weights say {value}"
                )


def in_range(value: Any, count: int, what: str, where: str = "") -> int:
    """`value` as an int from 0 to `count` - 1; integers of NumPy and torch count.

    Raises:
        ValueError: naming what it is ("layer", "head") and, before that, where.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not 0 <= number < count:
        problem = "is no integer" if number is None else "is out of range"
        raise ValueError(f"{where}{what} {value!r} {problem}; there are {what}s 0 to {count - 1}")
    return number


def _attributes(num_heads: int, num_key_value_heads: int, head_dim: int) -> dict[str, int]:
    """What attention modules call these numbers; a module has some of them."""
    return {
        "num_attention_heads": num_heads,
        "num_heads": num_heads,
        "n_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_key_value_groups": num_heads // num_key_value_heads,
        "all_head_size": num_heads * head_dim,
    }


def set_attributes(module: nn.Module, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
    """Write the numbers of heads onto an attention module.

    `num_key_value_groups` is written even where the class has none (BERT): Transformers' SDPA and
    flash attention read it to group heads.
    """
    for name, value in _attributes(num_heads, num_key_value_heads, head_dim).items():
        if hasattr(module, name) or name == "num_key_value_groups":
            setattr(module, name, value)


def config_heads(config: PreTrainedConfig, index: int) -> tuple[int, int]:
    """`(num_attention_heads, num_key_value_heads)` of a layer, as the config says."""
    layer = config.per_layer_config[index]
    num_heads = layer.num_attention_heads
    return num_heads, getattr(layer, "num_key_value_heads", None) or num_heads


# The config's field with the layers whose one head is a stand-in.
WITHOUT_HEADS = "layers_without_heads"


def layers_without_heads(config: PreTrainedConfig) -> frozenset[int]:
    """Layers whose one head is a stand-in, as the config says.

    Raises:
        ValueError: for anything else than a list of its layers.
    """
    given = getattr(config, WITHOUT_HEADS, None)
    if given is None:
        return frozenset()
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"config.{WITHOUT_HEADS}={given!r} must be a list of layers")
    return frozenset(in_range(index, config.num_hidden_layers, "layer", f"config.{WITHOUT_HEADS}: ") for index in given)


def read_pruned_heads(config: PreTrainedConfig) -> None:
    """Translate `pruned_heads` into today's fields, in place.

    Transformers 4 wrote it when heads were removed: `{layer: [head, ...]}`, counted as before the first pruning. The
    weights are without them, but `num_attention_heads` is as it was.

    Raises:
        ValueError: for heads that are not there, all heads of a layer, or a model that could not lose heads then.
    """
    given = config.__dict__.pop("pruned_heads", None)
    if not given:
        return
    where = f"config.pruned_heads={given!r} of Transformers 4"
    family = FAMILIES.get(config.model_type)
    if family is None or family.fixed or family.has_key_value_heads:
        raise ValueError(f"{where} cannot be understood for models of type {config.model_type!r}")
    if config.per_layer_config is not None and "per_layer_config" in config.to_diff_dict():
        raise ValueError(f"{where} stands beside per_layer_config; take out the one that does not fit the weights")
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
    write_heads(config, [(number, number) for number in numbers], config.hidden_size // config.num_attention_heads)


def with_heads(
    model: PreTrainedModel, heads: Sequence[tuple[int, int]], empty: Iterable[int] | None = None
) -> PreTrainedConfig:
    """A copy of the model's config with `(num_attention_heads, num_key_value_heads)` per layer.

    One number for all layers goes into the plain fields wherever Transformers can build the model
    from them; all else goes into `per_layer_config`.

    Args:
        empty: layers whose one head is a stand-in; by default those that the config names.

    Raises:
        ValueError: for different numbers, in a family that `reads_config`.
    """
    config = copy.deepcopy(model.config)
    write_heads(config, heads, attention_layers(model)[0].head_dim)
    if empty is not None:
        config.__dict__.pop(WITHOUT_HEADS, None)
        if indices := sorted(empty):
            setattr(config, WITHOUT_HEADS, indices)
    return config


def write_heads(config: PreTrainedConfig, heads: Sequence[tuple[int, int]], head_dim: int) -> None:
    """`with_heads`, in place: the fields with numbers of heads."""
    family = FAMILIES[config.model_type]
    others = _other_overrides(config)
    config.per_layer_config = None
    if not others:
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    base_heads = config.num_attention_heads
    config.head_dim = head_dim
    if not family.has_key_value_heads and not hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = base_heads

    num_heads, num_key_value_heads = heads[0]
    uniform = all(pair == heads[0] for pair in heads)
    if family.reads_config and not uniform:
        raise ValueError(
            f"{config.model_type!r} takes the numbers of heads of every layer from one config while it runs, so all "
            f"layers must have the same, not {heads}; change every layer alike"
        )
    rebuilt = family.has_head_dim and (family.has_key_value_heads or num_heads == num_key_value_heads)
    if uniform and num_heads == base_heads:
        config.num_key_value_heads = num_key_value_heads
        config.per_layer_config = others or None
        return
    if uniform and rebuilt and _accepts(config, num_heads, num_key_value_heads):
        config.per_layer_config = others or None
        return
    config.per_layer_config = {
        index: others.get(index, {}) | {"num_attention_heads": n, "num_key_value_heads": kv}
        for index, (n, kv) in enumerate(heads)
    }
    # The stock classes read the global numbers once while they build the model.
    config.allow_global_per_layer_attribute_access = True


def _other_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says about other things than heads."""
    saved = config.to_dict().get("per_layer_config") or {}
    numbers = {"num_attention_heads", "num_key_value_heads", config.attribute_map.get("num_attention_heads")}
    overrides = {int(index): {k: v for k, v in layer.items() if k not in numbers} for index, layer in saved.items()}
    return {index: layer for index, layer in overrides.items() if layer}


def _accepts(config: PreTrainedConfig, num_heads: int, num_key_value_heads: int) -> bool:
    """Set both numbers if the config's own validation accepts them (Llama wants heads that divide
    the hidden size); otherwise leave it as it was."""
    before = config.num_attention_heads, config.num_key_value_heads
    config.num_attention_heads, config.num_key_value_heads = num_heads, num_key_value_heads
    try:
        config.validate_architecture()
    except ValueError:
        config.num_attention_heads, config.num_key_value_heads = before
        return False
    return True
