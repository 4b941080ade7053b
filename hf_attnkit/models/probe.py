"""Small inputs under which every attention layer of a model runs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnkit.models.families import family_of
from hf_attnkit.models.layers import present_stacks


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs go; images enter through a convolution, tokens through an embedding."""
    try:
        device: torch.device = next(model.get_input_embeddings().parameters()).device
    except (NotImplementedError, AttributeError, StopIteration):  # several inputs (CLIP), or none of tokens
        device = next(model.parameters()).device
    return device


def probe_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Small inputs for `model.base_model` under which every one of its attention layers runs."""
    config, device, stacks = model.config, input_device(model), present_stacks(model)
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
