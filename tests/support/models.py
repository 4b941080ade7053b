"""Tiny models of every supported family and head type, built from configs, and padded batches for them.

Weights are large (initializer_range 0.2, biases and norms random), so that attention is far from
uniform and no bias is zero: a wrong mask, head or bias moves the logits by far more than rounding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    CohereModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForCausalLM,
    ElectraForPreTraining,
    ElectraModel,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    GlmConfig,
    GlmForCausalLM,
    GlmModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
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
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PhiConfig,
    PhiForCausalLM,
    PhiModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaModel,
    StableLmConfig,
    StableLmForCausalLM,
    StableLmModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForTokenClassification,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)


@dataclass(frozen=True)
class Sample:
    """A family under test.

    Attributes:
        config: its config class.
        classes: its model classes, by what they are for.
        options: what its config needs beside or instead of the common fields.
        reads_both_ways: whether it sees the future (an encoder that is not used as a decoder).
        grouped: whether its config knows key/value heads.
        editable: whether heads can be merged and removed.
    """

    config: type[PreTrainedConfig]
    classes: dict[str, type[PreTrainedModel]]
    options: dict[str, Any] = field(default_factory=dict)
    reads_both_ways: bool = False
    grouped: bool = False
    editable: bool = True


_PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
_CAUSAL = {"grouped": True, "options": {"bos_token_id": 1, "eos_token_id": None}}
_ENCODER_DECODER = {"reads_both_ways": True, "editable": False}
SAMPLES: dict[str, Sample] = {
    "bert": Sample(
        BertConfig,
        {
            "base": BertModel,
            "sequence": BertForSequenceClassification,
            "causal": BertLMHeadModel,
            "masked": BertForMaskedLM,
            "question": BertForQuestionAnswering,
            "token": BertForTokenClassification,
            "choice": BertForMultipleChoice,
            "next": BertForNextSentencePrediction,
        },
        reads_both_ways=True,
    ),
    "llama": Sample(
        LlamaConfig,
        {
            "base": LlamaModel,
            "sequence": LlamaForSequenceClassification,
            "causal": LlamaForCausalLM,
            "question": LlamaForQuestionAnswering,
            "token": LlamaForTokenClassification,
        },
        {"bos_token_id": 1, "eos_token_id": None, "attention_bias": True},
        grouped=True,
    ),
    "mistral": Sample(
        MistralConfig,
        {
            "base": MistralModel,
            "sequence": MistralForSequenceClassification,
            "causal": MistralForCausalLM,
            "question": MistralForQuestionAnswering,
            "token": MistralForTokenClassification,
        },
        {"bos_token_id": 1, "eos_token_id": None, "sliding_window": None},
        grouped=True,
    ),
    "roberta": Sample(
        RobertaConfig,
        {"base": RobertaModel, "masked": RobertaForMaskedLM, "causal": RobertaForCausalLM},
        reads_both_ways=True,
    ),
    "electra": Sample(
        ElectraConfig,
        {"base": ElectraModel, "token": ElectraForPreTraining, "causal": ElectraForCausalLM},
        {"embedding_size": 32},
        reads_both_ways=True,
    ),
    "distilbert": Sample(
        DistilBertConfig,
        {"base": DistilBertModel, "sequence": DistilBertForSequenceClassification},
        {"hidden_dim": 96},
        reads_both_ways=True,
    ),
    "qwen2": Sample(Qwen2Config, {"base": Qwen2Model, "causal": Qwen2ForCausalLM}, **_CAUSAL),
    "qwen3": Sample(
        Qwen3Config,
        {"base": Qwen3Model, "causal": Qwen3ForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "head_dim": 16},
        grouped=True,
    ),
    "gemma": Sample(
        GemmaConfig,
        {"base": GemmaModel, "causal": GemmaForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "head_dim": 16},
        grouped=True,
    ),
    "stablelm": Sample(
        StableLmConfig,
        {"base": StableLmModel, "causal": StableLmForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "use_qkv_bias": True, "rope_parameters": _PARTIAL},
        grouped=True,
    ),
    "phi": Sample(
        PhiConfig,
        {"base": PhiModel, "causal": PhiForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "rope_parameters": _PARTIAL},
        grouped=True,
    ),
    "phi3": Sample(
        Phi3Config,
        {"base": Phi3Model, "causal": Phi3ForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
        grouped=True,
    ),
    "cohere": Sample(
        CohereConfig,
        {"base": CohereModel, "causal": CohereForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None},
        grouped=True,
    ),
    "glm": Sample(
        GlmConfig,
        {"base": GlmModel, "causal": GlmForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "head_dim": 16, "attention_bias": True,
         "rope_parameters": _PARTIAL},
        grouped=True,
    ),
    "gpt2": Sample(
        GPT2Config,
        {"base": GPT2Model, "causal": GPT2LMHeadModel},
        {"bos_token_id": 1, "eos_token_id": None, "scale_attn_by_inverse_layer_idx": True},
        editable=False,
    ),
    "gpt_neox": Sample(
        GPTNeoXConfig,
        {"base": GPTNeoXModel, "causal": GPTNeoXForCausalLM},
        {"bos_token_id": 1, "eos_token_id": None, "rope_parameters": _PARTIAL},
        editable=False,
    ),
    "t5": Sample(
        T5Config,
        {"base": T5Model, "causal": T5ForConditionalGeneration, "token": T5ForTokenClassification},
        {"d_kv": 8, "d_ff": 96, "num_decoder_layers": 3, "initializer_factor": 2.0, "decoder_start_token_id": 1,
         "eos_token_id": None, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
        **_ENCODER_DECODER,
    ),
    "bart": Sample(
        BartConfig,
        {"base": BartModel, "causal": BartForConditionalGeneration, "question": BartForQuestionAnswering},
        {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "decoder_layers": 3, "decoder_attention_heads": 4,
         "init_std": 0.2, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": None,
         "forced_eos_token_id": None},
        **_ENCODER_DECODER,
    ),
    "vit": Sample(
        ViTConfig,
        {"base": ViTModel, "sequence": ViTForImageClassification},
        {"image_size": [12, 16], "patch_size": 4},
        reads_both_ways=True,
    ),
}  # fmt: skip
CLASSES = {family: sample.classes for family, sample in SAMPLES.items()}
FAMILIES = tuple(SAMPLES)
# The families that the tests of single functions run on; all families run in test_families.py.
DECODERS = ("llama", "mistral")
EVERY_HEAD = [(family, head) for family in ("bert", *DECODERS) for head in CLASSES[family] if head != "choice"]
VOCABULARY = 99


def build(family: str, head: str = "base", heads: int = 8, kv_heads: int | None = None, **options: Any) -> Any:
    """A model in evaluation mode; the same arguments give the same weights."""
    sample = SAMPLES[family]
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
    if sample.grouped:
        config |= {"num_key_value_heads": kv_heads or heads}
    else:
        assert kv_heads is None, f"{family} is grouped by convert_to_gqa only"
    if sample.reads_both_ways and sample.editable:
        config |= {"is_decoder": head == "causal"}
    torch.manual_seed(7)
    model = sample.classes[head](sample.config(**(config | sample.options | options)))
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
    return SAMPLES[model.config.model_type].reads_both_ways and not getattr(model.config, "is_decoder", False)


def has_decoder(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder: T5 and BART with both halves."""
    return bool(model.config.is_encoder_decoder)


def batch(model: PreTrainedModel, lengths: tuple[int, ...] = (13, 7, 10), seed: int = 0) -> dict[str, Tensor]:
    """Sequences of several lengths, padded on the left for decoders and on the right for encoders.

    Images have as many patches as all images of the model; the lengths say how many of them are seen.
    Encoder-decoders also get target sequences, two tokens shorter than the longest source.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if reads_both_ways(model) else slice(longest - length, None)] = 1
    if model.config.model_type == "vit":
        height, width = model.config.image_size
        pixels = torch.randn(len(lengths), model.config.num_channels, height, width, generator=generator)
        tokens = torch.arange(1 + height * width // model.config.patch_size**2)  # the class token and the patches
        return {"pixel_values": pixels, "attention_mask": (tokens < torch.tensor(lengths)[:, None]).long()}
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if has_decoder(model):
        targets = torch.randint(1, VOCABULARY, (len(lengths), longest - 2), generator=generator)
        target_mask = (torch.arange(longest - 2) < torch.tensor(lengths)[:, None] - 1).long()
        inputs |= {"decoder_input_ids": targets * target_mask, "decoder_attention_mask": target_mask}
    elif model.config.model_type in ("bert", "roberta", "electra", "gpt2") and not reads_both_ways(model):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """What the head computes, one tensor; hidden states or logits of padding set to zero."""
    result = model(**inputs, **options)
    if "start_logits" in result:
        tensor = torch.stack([result.start_logits, result.end_logits], dim=-1)
    else:
        tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    if tensor.dim() >= 2 and tensor.shape[:2] == mask.shape:
        tensor = tensor.masked_fill(mask.view(*mask.shape, *[1] * (tensor.dim() - 2)) == 0, 0.0)
    return tensor


EDITABLE = [family for family in SAMPLES if SAMPLES[family].editable]
