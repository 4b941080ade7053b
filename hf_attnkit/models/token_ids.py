"""Token ids outside a model's vocabulary, told before the model runs: it would only say that an index is out of range,
and on a GPU that the device failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def require_known_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raise `ValueError` for ids of `input_ids` or `decoder_input_ids` that the model's table of tokens has no row for.

    A model whose tokens are no rows of one table is not looked at. Ids that the config names, such as an image's
    placeholder, may lie outside: the model puts something else in their place.
    """
    for name, part in (("input_ids", model), ("decoder_input_ids", _decoder(model))):
        ids, rows = inputs.get(name), None if part is None else _rows(part)
        if rows is None or not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel() or ids.is_meta:
            continue
        outside = ids[(ids < 0) | (ids >= rows)].unique()
        if wrong := [number for number in outside.tolist() if number not in _placeholders(model)]:
            raise ValueError(
                f"{name} holds the token id {wrong[0]}, and the vocabulary of {type(model).__name__} has ids from 0 to "
                f"{rows - 1} (vocab_size={rows}); take the tokenizer of this model"
            )


def _decoder(model: PreTrainedModel) -> PreTrainedModel | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    found = model.get_decoder()
    return found if isinstance(found, PreTrainedModel) else None


def _rows(model: PreTrainedModel) -> int | None:
    """How many tokens the table has, where it is one of tokens."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # several inputs, or none of tokens
        return None
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(table, nn.Embedding) or not isinstance(size, int) or table.num_embeddings < size:
        return None
    return table.num_embeddings


def _placeholders(model: PreTrainedModel) -> set[int]:
    """Ids that the config names: `image_token_id`, `audio_token_index` ..."""
    named = vars(model.config).items()
    return {value for name, value in named if "token_i" in name and isinstance(value, int)}
