"""How many tokens a model can number."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def positions(model: PreTrainedModel) -> int | None:
    """The most tokens that the model's positions take; `None` where its config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = limit if isinstance(limit, int) else None
    for name, module in model.named_modules():
        # RoBERTa counts from behind the padding token's number: its table has rows that no token can have.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            most = module.num_embeddings - module.padding_idx - 1
    return most
