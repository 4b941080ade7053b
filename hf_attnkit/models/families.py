"""The table of model families: where a model keeps its attention layers, and what running it cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


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
        fused: `query`, `key` and `value` are one `nn.Linear`, whose rows are in this order.
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


def family_of(model: PreTrainedModel, *, adapters: bool = False) -> Family:
    """The model's row of the table.

    Args:
        adapters: accept a model with PEFT adapters inside: it is looked at and not changed.

    Raises:
        TypeError: if it is no `PreTrainedModel` (compiled, wrapped for training, or PEFT).
        ValueError: if its family is refused or not in the table, or it has adapters or cross-attention
            that the table does not know.
    """
    require_plain(model, adapters=adapters)
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        remedy = "" if reason else ". A family is one row in hf_attnkit/models/families.py"
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
