"""Tokens to trace a model with, and others to compare it on: lengths, batches and padding that were not traced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.models.positions import positions

TRACED = (2, 24)  # batch, tokens
BATCHES = (1, 3)
LENGTHS = (5, 40, 150)


def input_names(model: PreTrainedModel, known: Sequence[str] | None) -> list[str]:
    """What the exported graph takes: those of a tokenizer's outputs that the model's forward takes.

    Args:
        known: `tokenizer.model_input_names`; `None` without a tokenizer.
    """
    parameters = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    types = getattr(model.config, "type_vocab_size", 0) > 1 if known is None else "token_type_ids" in known
    if types and "token_type_ids" in parameters:
        names.append("token_type_ids")
    return names


def traced_inputs(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Tensor]:
    """The batch that is traced, with a padded row."""
    batch, length = TRACED
    limit = positions(model)
    return make_inputs(model, names, batch, length if limit is None else min(length, limit))


def compared_inputs(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Batches of other sizes: three lengths, or as many as the model's positions allow, times two batches.

    Of each, one row is padded on the right, and of several also one on the left.
    """
    limit = positions(model)
    lengths = LENGTHS if limit is None else tuple(sorted({min(length, limit) for length in LENGTHS}))
    for batch in BATCHES:
        for length in lengths:
            yield make_inputs(model, names, batch, length)


def make_inputs(model: PreTrainedModel, names: Sequence[str], batch: int, length: int) -> dict[str, Tensor]:
    """A batch of token ids `(batch, length)`, none of them special, with padded rows; the same at each call."""
    generator = torch.Generator().manual_seed(1000 * batch + length)
    config = model.config.get_text_config()
    special: set[Any] = set()
    for name, value in vars(config).items():
        if name.endswith("_token_id"):
            special |= set(value) if isinstance(value, list) else {value}
    plain = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special])
    ids = plain[torch.randint(len(plain), (batch, length), generator=generator)]
    mask = torch.ones(batch, length, dtype=torch.long)
    hidden = length // 3
    mask[-1, length - hidden :] = 0
    if batch > 2:
        mask[1, :hidden] = 0
    padding = config.pad_token_id
    # Where the model cannot tell padding by its id, any token will do.
    ids = ids.masked_fill(mask == 0, padding if isinstance(padding, int) and padding >= 0 else int(plain[0]))
    made = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in names:
        made["token_type_ids"] = (torch.arange(length) >= length // 2).long().expand(batch, -1).contiguous()
    return made
