"""Tiny models of every supported family and head type, built from configs, and padded batches for them.

Weights are large (initializer_range 0.2, biases and norms random), so that attention is far from
uniform and no bias is zero: a wrong mask, head or bias moves the logits by far more than rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    PreTrainedModel,
)

CONFIGS = {"bert": BertConfig, "llama": LlamaConfig, "mistral": MistralConfig}
CLASSES: dict[str, dict[str, type[PreTrainedModel]]] = {
    "bert": {
        "base": BertModel,
        "sequence": BertForSequenceClassification,
        "causal": BertLMHeadModel,
        "masked": BertForMaskedLM,
        "question": BertForQuestionAnswering,
        "token": BertForTokenClassification,
        "choice": BertForMultipleChoice,
        "next": BertForNextSentencePrediction,
    },
    "llama": {
        "base": LlamaModel,
        "sequence": LlamaForSequenceClassification,
        "causal": LlamaForCausalLM,
        "question": LlamaForQuestionAnswering,
        "token": LlamaForTokenClassification,
    },
    "mistral": {
        "base": MistralModel,
        "sequence": MistralForSequenceClassification,
        "causal": MistralForCausalLM,
        "question": MistralForQuestionAnswering,
        "token": MistralForTokenClassification,
    },
}
FAMILIES = tuple(CONFIGS)
DECODERS = ("llama", "mistral")
EVERY_HEAD = [(family, head) for family in FAMILIES for head in CLASSES[family] if head != "choice"]
VOCABULARY = 99


def build(family: str, head: str = "base", heads: int = 8, kv_heads: int | None = None, **options: Any) -> Any:
    """A model in evaluation mode; the same arguments give the same weights."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    if family == "bert":
        assert kv_heads is None, "BERT is grouped by convert_to_gqa only"
        config |= {"is_decoder": head == "causal"}
    else:
        config |= {"num_key_value_heads": kv_heads or heads, "bos_token_id": 1, "eos_token_id": None}
    if family == "llama":
        config |= {"attention_bias": True}
    if family == "mistral":
        config |= {"sliding_window": None}
    torch.manual_seed(7)
    model = CLASSES[family][head](CONFIGS[family](**(config | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def aligned(model: PreTrainedModel) -> Any:
    """A loaded model, in evaluation mode, in memory of its own.

    Loaded weights lie at any byte of the mapped file, and a matrix product's rounding depends on the
    alignment: only with a copy can outputs be compared bit by bit (stock models alike).
    """
    return copy.deepcopy(model.eval())


def reads_both_ways(model: nn.Module) -> bool:
    return model.config.model_type == "bert" and not model.config.is_decoder


def batch(model: PreTrainedModel, lengths: tuple[int, ...] = (13, 7, 10), seed: int = 0) -> dict[str, Tensor]:
    """Sequences of several lengths, padded on the left for decoders and on the right for encoders."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if reads_both_ways(model) else slice(longest - length, None)] = 1
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if model.config.model_type == "bert" and not reads_both_ways(model):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """What the head computes, one tensor; hidden states or logits of padding set to zero."""
    result = model(**inputs, **options)
    if "start_logits" in result:
        tensor = torch.stack([result.start_logits, result.end_logits], dim=-1)
    else:
        tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    if tensor.dim() == 3 and tensor.shape[1] == inputs["input_ids"].shape[1]:
        tensor = tensor.masked_fill(inputs["attention_mask"][..., None] == 0, 0.0)
    return tensor
