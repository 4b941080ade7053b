"""Swapped copies of small models, and what they compute."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from support.matrix import EXACT, MATRIX, kind
from support.models import SAMPLES, build, outputs
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import convert_to_gqa, swap_attention
from hf_attnkit.attention.kind import PARAMETERS

# The longest sum that rounds: over the intermediate layer.
TERMS = 96


def swapped(model: PreTrainedModel, name: Any, **options: Any) -> PreTrainedModel:
    """A swapped copy; `name` may be a case of the matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="linear attention is another function")
        options = (MATRIX[name].options if isinstance(name, str) and name in EXACT else {}) | options
        return swap_attention(copy.deepcopy(model), kind(name) if isinstance(name, str) else name, **options)


def build_for(name: str, family: str, head: str = "base", **options: Any) -> PreTrainedModel:
    """With one key/value head for `mqa`, grouped heads otherwise, where the family has them."""
    if not SAMPLES[family].grouped:
        model = build(family, head, **options)
        return convert_to_gqa(model, 1) if name == "mqa" else model
    return build(family, head, 8, 2 if MATRIX[name].grouped else 1, **options)


def results(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The head's output and the gradients of all parameters of a loss, those that only a swapped model has left out."""
    model.zero_grad()
    output = outputs(model, inputs, **options)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output.double() * weight.to(output.device)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and PARAMETERS not in n}
    return {"output": output.detach()} | grads


def layer_of(name: str) -> str:
    found = re.search(r"^.*?\b(layers?|block|h)\.\d+\.", name)
    return found[0] if found else name
