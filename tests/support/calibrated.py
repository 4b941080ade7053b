"""Batches for small models of any type, and how far a changed one is from the untouched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.any_model import any_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.models.discovery import discover

# Served by what discovery finds; of some the forward pass takes as many key/value heads as query heads only.
CONVERTED = ("gpt2", "gemma2", "mixtral", "bart", "whisper")
FIXED = ("opt", "gpt_neox", "modernbert")


def lively(model_type: str, **options: Any) -> PreTrainedModel:
    """A small model whose attention is far from uniform: random matrices three times as large."""
    model = any_model(model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            elif "bias" in name:
                parameter.normal_(0, 0.3)
    return model


def batches_for(model: PreTrainedModel, count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random text with a padded row, or random features."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> Tensor:
        return torch.randint(3, 48, (4, length), generator=generator)

    found: list[dict[str, Tensor]] = []
    for _ in range(count):
        if model.main_input_name != "input_ids":
            inputs = discover(model).inputs
            shapes = {name: x.shape[1:] for name, x in inputs.items()
                      if isinstance(x, Tensor) and x.is_floating_point()}  # fmt: skip
            found.append({n: torch.randn(4, *s, generator=generator).to(model.dtype) for n, s in shapes.items()})
        elif model.config.model_type == "a_type_that_nobody_has_seen":
            found.append({"input_ids": text(9)})
            continue
        else:
            mask = torch.ones(4, 12, dtype=torch.long)
            mask[0, 9:] = 0
            found.append({"input_ids": text(12), "attention_mask": mask})
        if model.config.is_encoder_decoder:
            mask = torch.ones(4, 7, dtype=torch.long)
            mask[1, 5:] = 0
            found[-1] |= {"decoder_input_ids": text(7), "decoder_attention_mask": mask}
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output, as log-probabilities, of the tokens that are no padding."""
    output = model(**inputs)[0]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    output = output if mask is None else output[mask.bool()]
    return output.double().log_softmax(-1)


def divergence(changed: PreTrainedModel, untouched: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean KL divergence per token in nats of the changed model's predictions from the untouched model's."""
    each = []
    for inputs in batches:
        p, q = logits(untouched, inputs), logits(changed, inputs)
        each.append((p.exp() * (p - q)).sum(-1).mean())
    return float(torch.stack(each).mean())
