"""The table of model families: where a model keeps its attention layers, and what running it cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How the models of a family keep attention. `layers` is a path from the base model, other paths are from a layer.

    Attributes:
        layers: the list of layers, each with one attention.
        attention: the module whose forward calls the attention interface.
        query, key, value, output: the projections.
        head_dim: name of the attention module's attribute with the size of a head.
        fused: `query`, `key` and `value` are one `nn.Linear`, whose rows are in this order.
        has_key_value_heads: whether the family's config class knows `num_key_value_heads`. Where it
            does not, Transformers cannot rebuild grouped heads and `load_pretrained` does.
        has_head_dim: whether the family's classes read `head_dim` from the config. Where they do not,
            Transformers cannot rebuild fewer heads and `load_pretrained` does.
        rope: how the rotary embedding pairs the components of a head: "half" (component f with f + half
            of them, as Llama) or "interleaved" (2f with 2f + 1, as GPT-J); empty without one. The share
            that is rotated is the config's `partial_rotary_factor`.
        reads_config: whether the attention's forward takes numbers of heads from the model's config, so that
            all layers must have the same.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    head_dim: str = "head_dim"
    fused: bool = False
    has_key_value_heads: bool = False
    has_head_dim: bool = False
    rope: str = ""
    reads_config: bool = False


def _family(layers: str, attention: str, projections: str, **others: Any) -> Family:
    """A family whose attention modules hold the projections `"query key value output"` themselves."""
    query, key, value, output = (f"{attention}.{name}" for name in projections.split())
    return Family(layers, attention, query, key, value, output, **others)


_BERT = Family(
    layers="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    head_dim="attention_head_size",
)


_DISTILBERT = _family("transformer.layer", "attention", "q_lin k_lin v_lin out_lin", head_dim="attention_head_size")


_LLAMA = _family("layers", "self_attn", "q_proj k_proj v_proj o_proj",
                 has_key_value_heads=True, has_head_dim=True, rope="half")  # fmt: skip


_PHI = _family("layers", "self_attn", "q_proj k_proj v_proj dense",
               has_key_value_heads=True, has_head_dim=True, rope="half")  # fmt: skip


_PHI3 = _family("layers", "self_attn", "qkv_proj qkv_proj qkv_proj o_proj", fused=True,
                has_key_value_heads=True, has_head_dim=True, rope="half", reads_config=True)  # fmt: skip


_STABLELM = _family("layers", "self_attn", "q_proj k_proj v_proj o_proj", has_key_value_heads=True, rope="half")


_COHERE = _family("layers", "self_attn", "q_proj k_proj v_proj o_proj",
                  has_key_value_heads=True, has_head_dim=True, rope="interleaved")  # fmt: skip


_VIT = _family("layers", "attention", "q_proj k_proj v_proj o_proj", has_head_dim=True)


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
    "vit": _VIT,
}


def family_of(model: PreTrainedModel, *, adapters: bool = False) -> Family:
    """The row of a model that is in the table.

    Args:
        adapters: accept a model with PEFT adapters inside: it is looked at and not changed.

    Raises:
        TypeError: if it is no `PreTrainedModel` (compiled, wrapped for training, or PEFT).
        ValueError: if it has adapters.
    """
    require_plain(model, adapters=adapters)
    return FAMILIES[model.config.model_type]


def require_plain(model: PreTrainedModel, *, adapters: bool = False) -> None:
    """Raise `TypeError` for what is no `PreTrainedModel`, and `ValueError` for one with PEFT adapters.

    Args:
        adapters: as of `family_of`.
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
