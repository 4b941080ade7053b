"""Ask which kernel each swapped layer runs, by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.consistency import is_swapped
from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.kind import ATTRIBUTE, Kind, Stock
from hf_attnkit.attention.mask import Mask
from hf_attnkit.models.layers import attention_layers


def attention_backends(model: PreTrainedModel, **inputs: Any) -> dict[int, tuple[str, str]]:
    """Which backend each swapped layer takes for these inputs, and why.

    Runs one forward pass of the model as it is (in training mode with its dropout; the random state is
    restored). The choice depends on device, length, padding, dropout and gradients.

    Args:
        inputs: what the model takes, for example `**tokenizer(texts, return_tensors="pt")`.

    Returns:
        Layer number -> `(backend, reason)`. A kind without a choice has its own name as backend.

    Raises:
        ValueError: if no layer is swapped.
    """
    if not is_swapped(model):
        raise ValueError(
            f"{type(model).__name__} runs {model.config._attn_implementation!r} in every layer; "
            "hf_attnkit.swap_attention(model, 'flash') gives it attention with a choice of kernels"
        )
    numbers = {id(layer.module): layer.index for layer in attention_layers(model)}
    chosen: dict[int, tuple[str, str]] = {}
    running: list[int] = []

    def start(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        kind: Kind | Stock = getattr(module, ATTRIBUTE)
        running[:] = [numbers[id(module)]]
        chosen[running[0]] = (kind.name, "no choice" if isinstance(kind, Kind) else "not swapped")

    def note(backend: str, reason: str) -> None:
        chosen[running[0]] = (backend, reason)

    with torch.random.fork_rng(), observe(start), backends.listen(note):
        model(**inputs)
    return dict(sorted(chosen.items()))
