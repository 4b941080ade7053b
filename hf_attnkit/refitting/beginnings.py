"""Further beginnings of texts for a decoder's refit, made of its calibration.

A decoder's first token is where its heads rest: it sees nothing but itself, and its hidden states are far larger than
all others. A few long texts have few first tokens, and a fit to these alone can be far off at another one, which all
tokens after it then see (see docs/conversion.md). So single tokens of the calibration are fitted too, each a text of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.models.layers import AttentionLayer

# Of the calibration's tokens; more would be fitted to beginnings than to what follows.
SHARE = 1 / 32


def beginnings(
    layers: Sequence[AttentionLayer],
    batches: Sequence[Mapping[str, Any]],
    aside: Sequence[Sequence[int]],
    most: int,
) -> dict[str, Any] | None:
    """A batch of texts of one token each, or `None` where the calibration has what a text begins with.

    None are made where some layer is not causal, where anything but `input_ids` and their mask is given, or where all
    texts begin with the same token, as with a tokenizer that puts one there.

    Args:
        aside: for each batch the rows that are held out, of which no token is taken.
        most: different first tokens, with those of the batches.
    """
    if not all(layer.attention.is_causal for layer in layers) or not all(map(_is_plain, batches)):
        return None
    firsts: list[Tensor] = []
    fitted: list[Tensor] = []
    for batch, rows in zip(batches, aside, strict=True):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        for row in range(len(ids)):
            tokens = ids[row] if mask is None else ids[row][mask[row].bool()]
            firsts.append(tokens[:1])
            if row not in rows:
                fitted.append(tokens)
    given, tokens = torch.cat(firsts).unique(), torch.cat(fitted)
    count = min(most, int(len(tokens) * SHARE)) - len(given)
    others = tokens.unique()
    others = others[~torch.isin(others, given)]
    if count <= 0 or not len(others) or len(firsts) > len(given) == 1:
        return None
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:count].to(others.device)
    options = {name: value for name, value in batches[0].items() if not isinstance(value, Tensor)}
    return options | {"input_ids": others[order, None]}


def _is_plain(batch: Mapping[str, Any]) -> bool:
    """Whether tokens and which of them are padding is all that a model is given."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    others = (value for name, value in batch.items() if name not in ("input_ids", "attention_mask"))
    return (
        isinstance(ids, Tensor)
        and ids.dim() == 2
        and (mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape))
        and all(isinstance(value, (bool, int, float, str, type(None))) for value in others)
    )
