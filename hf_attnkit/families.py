"""The one table of model families, and what is read from and written to a model with its help.

A family says where a layer keeps its query, key, value and output projections. Numbers of heads are
read from the config (Transformers' own fields, `per_layer_config` where layers differ) and checked
against the weights; `with_heads` and `set_attributes` are the only places that write them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Where a model family keeps things. Paths are relative to the base model, then to a layer.

    Attributes:
        layers: the list of layers.
        attention: the module whose forward calls the attention interface.
        query, key, value, output: the projections (`nn.Linear`).
        head_dim: name of the attention module's attribute with the size of a head.
        has_key_value_heads: whether the family's config class knows `num_key_value_heads`. Where it
            does not, Transformers cannot rebuild grouped or fewer heads and `load_pretrained` does.
        rope: whether keys are rotated between projection and product.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    head_dim: str
    has_key_value_heads: bool
    rope: bool


_BERT = Family(
    layers="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    head_dim="attention_head_size",
    has_key_value_heads=False,
    rope=False,
)
_LLAMA = Family(
    layers="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    head_dim="head_dim",
    has_key_value_heads=True,
    rope=True,
)

# config.model_type -> family
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
}


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: number of the layer.
        module: the module whose forward calls the attention interface.
        query, key, value, output: the projections.
        num_heads, num_key_value_heads, head_dim: as the config says.
    """

    index: int
    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_key_value_heads


def family_of(model: PreTrainedModel) -> Family:
    """The model's row of the table.

    Raises:
        TypeError: if it is no `PreTrainedModel` (compiled, wrapped for training, or PEFT).
        ValueError: if its family is not in the table, or it has adapters or cross-attention.
    """
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
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
        raise ValueError(
            f"models of type {model_type!r} ({type(model).__name__}) are not supported; supported: "
            f"{', '.join(FAMILIES)}. A family is one row in hf_attnkit/families.py"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"{type(model).__name__} has cross-attention (config.add_cross_attention=True), which is not supported; "
            "load the model without it"
        )
    return FAMILIES[model_type]


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers, first to last, with the numbers of heads from the config.

    Raises:
        TypeError, ValueError: as `family_of`.
    """
    family = family_of(model)
    layers = []
    for index, layer in enumerate(model.base_model.get_submodule(family.layers)):
        num_heads, num_key_value_heads = config_heads(model.config, index)
        module = layer.get_submodule(family.attention)
        parts = {name: layer.get_submodule(getattr(family, name)) for name in ("query", "key", "value", "output")}
        head_dim = getattr(module, family.head_dim)
        layers.append(AttentionLayer(index, module, **parts, num_heads=num_heads,
                                     num_key_value_heads=num_key_value_heads, head_dim=head_dim))  # fmt: skip
    return layers


def editable_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of a model whose weights may be cut.

    Raises:
        TypeError, ValueError: as `family_of`, and for weights that are on the meta device, quantized
            or wrapped, or whose sizes disagree with the config.
    """
    layers = attention_layers(model)
    for layer in layers:
        for name in ("query", "key", "value", "output"):
            linear = getattr(layer, name)
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
                raise ValueError(
                    f"layer {layer.index}: the {name} projection is a "
                    f"{type(linear).__module__}.{type(linear).__name__} and not a plain nn.Linear; load the model "
                    "without quantization (for GGUF: gguf_file=..., which dequantizes) and without adapters"
                )
            if linear.weight.is_meta:
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
        found = (layer.query.out_features, layer.key.out_features, layer.value.out_features, layer.output.in_features)
        shapes = tuple(layer.query.weight.shape[:1] + layer.key.weight.shape[:1] + layer.value.weight.shape[:1]
                       + layer.output.weight.shape[1:])  # fmt: skip
        expected = (width, kv_width, kv_width, width)
        if found != expected or shapes != expected:
            raise ValueError(
                f"layer {layer.index}: the config says {layer.num_heads} query and {layer.num_key_value_heads} "
                f"key/value heads of size {layer.head_dim}, which needs projections of {expected} features (query, "
                f"key, value, output), but the weights have {shapes}; correct the config or load with "
                "hf_attnkit.load_pretrained"
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


def with_heads(model: PreTrainedModel, heads: Sequence[tuple[int, int]]) -> PreTrainedConfig:
    """A copy of the model's config with `(num_attention_heads, num_key_value_heads)` per layer.

    One number for all layers goes into the plain fields wherever Transformers can build the model
    from them; all else goes into `per_layer_config`.
    """
    family, config = family_of(model), copy.deepcopy(model.config)
    others = _other_overrides(config)
    config.per_layer_config = None
    if not others:
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    base_heads = config.num_attention_heads
    config.head_dim = attention_layers(model)[0].head_dim
    if not family.has_key_value_heads and not hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = base_heads

    num_heads, num_key_value_heads = heads[0]
    uniform = all(pair == heads[0] for pair in heads)
    if uniform and num_heads == base_heads:
        config.num_key_value_heads = num_key_value_heads
        config.per_layer_config = others or None
        return config
    if uniform and family.has_key_value_heads and _accepts(config, num_heads, num_key_value_heads):
        config.per_layer_config = others or None
        return config
    config.per_layer_config = {
        index: others.get(index, {}) | {"num_attention_heads": n, "num_key_value_heads": kv}
        for index, (n, kv) in enumerate(heads)
    }
    # The stock classes read the global numbers once while they build the model.
    config.allow_global_per_layer_attribute_access = True
    return config


def _other_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says about other things than heads."""
    saved = config.to_dict().get("per_layer_config") or {}
    overrides = {
        int(index): {k: v for k, v in layer.items() if k not in ("num_attention_heads", "num_key_value_heads")}
        for index, layer in saved.items()
    }
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
