"""Numbers of heads in configs: Transformers' own fields, and `per_layer_config` where layers differ.

A layer may have lost all of its heads and keep a stand-in (see `without_heads`). The config counts that as one head,
and names the layer in `layers_without_heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from hf_attnkit.common.checks import in_range
from hf_attnkit.models.families import FAMILIES
from hf_attnkit.models.global_reads import expect_global_reads


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
    if family is None or family.has_key_value_heads:
        raise ValueError(f"{where} cannot be understood for models of type {config.model_type!r}")
    if config.per_layer_config is not None and "per_layer_config" in config.to_diff_dict():
        raise ValueError(f"{where} and per_layer_config are both there; remove the one that does not fit the weights")
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


def write_heads(config: PreTrainedConfig, heads: Sequence[tuple[int, int]], head_dim: int) -> None:
    """Write the fields with numbers of heads; see `hf_attnkit.editing.change.with_heads`."""
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
    expect_global_reads()


def is_rebuilt_by_stock(config: PreTrainedConfig) -> bool:
    """Whether Transformers' own class builds a model with the numbers of heads that `write_heads` wrote."""
    family = FAMILIES[config.model_type]
    saved = config.to_dict().get("per_layer_config") or {}
    if any("num_attention_heads" in layer for layer in saved.values()):
        return False
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return family.has_key_value_heads or bool(num_key_value_heads == config.num_attention_heads)


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
