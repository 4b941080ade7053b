"""Small models of every type that Transformers maps, with random weights from a seed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

# Later ones win: the class of a type is that of the last task that has it.
TASKS = (
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
CLASSES: dict[str, str] = {}
for _task in TASKS:
    for _type, _names in getattr(modeling_auto, _task).items():
        CLASSES[_type] = _names if isinstance(_names, str) else _names[0]

WIDTH, HEADS, GROUPS, SIZE, LAYERS = 32, 4, 2, 8, 2
LARGEST = 2e7
SMALL: dict[str, Any] = (
    dict.fromkeys((
        "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size",
        "intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
        "mlp_dim", "ffn_hidden_size", "projection_dim", "output_dim", "decoder_hidden_size",
        "moe_intermediate_size", "conv_dim_out", "qkv_hidden_size", "shared_expert_intermediate_size", "d_inner",
        "output_hidden_size", "out_hidden_size", "inner_dim", "feat_proj_dim", "decoder_intermediate_size",
        "encoder_hidden_size", "cross_attention_hidden_size", "n_state", "cross_hidden_size",
        "hidden_size_per_layer_input", "moe_ffn_hidden_size", "lru_width", "audio_embed_dim", "text_embed_dim",
        "projector_hidden_size", "alignment_intermediate_size", "ext_pw_out_channel",
        "depthwise_separable_out_channel", "nemo_conv_channels", "subsampling_conv_channels", "output_channels",
        "post_conv_in_channels", "post_conv_out_channels", "post_conv_mid_channels",
        "unpadded_vocab_size", "num_bpe_labels", "num_wordpiece_labels", "mel_vocab_size",
    ), WIDTH)
    | dict.fromkeys((
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers", "encoder_num_hidden_layers",
        "num_block", "n_block", "depth",
    ), LAYERS)
    | dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads", "decoder_num_attention_heads", "encoder_num_attention_heads", "num_experts",
        "num_local_experts", "n_routed_experts", "moe_num_experts", "num_attention_heads_linear",
        "swa_num_attention_heads", "linear_num_heads", "resampler_n_latents",
    ), HEADS)
    | dict.fromkeys((
        "num_key_value_heads", "num_experts_per_tok", "attn_layer_period", "full_attention_interval", "moe_k",
        "moe_topk", "num_kv_heads", "global_attn_every_n_layers", "decoder_num_key_value_heads",
        "encoder_num_key_value_heads", "swa_num_key_value_heads",
    ), GROUPS)
    | dict.fromkeys((
        "head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim",
        "decoder_head_dim", "global_head_dim", "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim",
        "attention_head_dim", "linear_head_dim", "resampler_head_dim",
    ), SIZE)
    | dict.fromkeys((
        "n_group", "topk_group", "n_groups", "mamba_n_groups", "attn_layer_offset", "num_conv_layers",
        "first_k_dense_replace", "bos_token_id",
    ), 1)
    | dict.fromkeys((
        "kv_lora_rank", "q_lora_rank", "mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head",
        "mamba_head_dim", "o_lora_rank", "index_head_dim", "rel_extent",
    ), 16)
    | {
        "mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_expand": 2, "expand": 2, "chunk_size": 8,
        "mamba_chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "vocab_size": 99,
        "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 1, "type_vocab_size": 2, "sliding_window": 16, "image_token_id": 98,
        "image_token_index": 98, "video_token_id": 97, "audio_token_id": 96, "image_size": 16, "patch_size": 8,
        "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32, "index_n_heads": 4,
        "index_topk": 4, "attn_layer_indices": [1], "vocab_size_per_layer_input": 99, "num_channels": 3,
        "n_mels": 16, "num_nextn_predict_layers": 0, "num_mtp_layers": 0, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
)  # fmt: skip
# What single types need.
EXTRA: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * LAYERS, "num_hidden_layers": 2 * LAYERS},
    "bailing_hybrid": {"layer_group_size": 2, "num_hidden_layers": 2, "head_dim": SIZE},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"] * LAYERS, "num_hidden_layers": 4 * LAYERS},
    "hiera": {"image_size": [64, 64], "depths": [1, 1, 2, 1]},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [16, 48, 96]},
    "led": {"attention_window": 8},
    "longformer": {"attention_window": 8},
    "pegasus_x": {"block_size": 16},
    "time_series_transformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "autoformer": {"prediction_length": 4},
    "reformer": {"is_decoder": True},
    "esmc": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "bros": {"bbox_scale": 1.0, "dim_bbox": 8, "dim_bbox_projection": 8, "dim_bbox_sinusoid_emb_2d": 8},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "yolos": {"image_size": [16, 16]},
    "gemma4_text": {"global_head_dim": 2 * SIZE},
    "gemma4_unified_text": {"global_head_dim": 2 * SIZE},
    "embedding_gemma2_text": {"global_head_dim": 2 * SIZE},
    "mobilevit": {"neck_hidden_sizes": [16] * 7, "hidden_sizes": [WIDTH] * 3},
    "unlimited_ocr_sam_vision_model": {"output_channels": 256},
    "phi4_multimodal_audio": {"num_blocks": LAYERS},
}
DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")


def small_config(kind: type[PreTrainedConfig], depth: int = 0) -> PreTrainedConfig:
    """A config of this class with few and small layers, and small parts."""
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    known |= set(getattr(kind, "attribute_map", {}))
    given = {name: value for name, value in SMALL.items() if name in known}
    try:
        whole: PreTrainedConfig | None = kind()
    except Exception:
        whole = None
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(whole, name, None)
        if isinstance(part, PreTrainedConfig) and depth < 3:
            given[name] = small_config(type(part), depth + 1)
    if "qk_rope_head_dim" in known:  # latent attention: a head is what is rotated and what is not
        given.pop("head_dim", None)
        if "num_key_value_heads" in given:
            given["num_key_value_heads"] = HEADS
    if {"linear_num_key_heads", "mamba_d_state", "ssm_state_size", "conv_L_cache"} & known:
        for name in ("num_hidden_layers", "num_layers"):
            if name in given:
                given[name] = 2 * LAYERS  # hybrids: some of them attend
    if isinstance(wide := getattr(whole, "conv_dim", None), list | tuple):  # wav2vec2 and its like, mostly convolutions
        given["conv_dim"] = [WIDTH] * len(wide)
    config = _accepted(kind, given | EXTRA.get(kind.model_type, {}))
    rotary = getattr(config, "rope_parameters", None)
    if isinstance(rotary, dict) and "rope_type" in rotary:
        rotary["mrope_section"] = [1, 1, 2]  # of half a head, where the model takes three positions
    return config


def _accepted(kind: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    """The config, without the values that its class refuses by name."""
    while True:
        try:
            return kind(**given)
        except Exception as error:
            named = [name for name in given if re.search(rf"\b{name}\b", str(error))]
            if not named:
                raise
            if {"num_key_value_heads", "num_attention_heads"} <= set(named):
                given["num_key_value_heads"] = given["num_attention_heads"] = GROUPS
                named = ["num_key_value_heads"]
            given = {name: value for name, value in given.items() if name != named[0]}


def small_model(model_type: str) -> PreTrainedModel:
    """A small model of this type in evaluation mode, whose attention matters.

    Raises:
        Exception: whatever the model's code raises; `MemoryError` where the model is large for all that.
    """
    config = small_config(CONFIG_MAPPING[model_type])
    for each in (config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))):
        for name in DROPOUTS:
            if isinstance(getattr(each, name, None), float):
                setattr(each, name, 0.0)
    kind = getattr(transformers, CLASSES[model_type])
    with torch.device("meta"), no_init_weights():
        size = sum(p.numel() for p in kind._from_config(config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = kind._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.is_floating_point():
                parameter.mul_(4)  # small random weights attend to everything alike
    return model
