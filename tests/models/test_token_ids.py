"""Token ids that a model does not know are refused by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, describe_attention, head_importance, head_statistics, prune_heads, set_probe
from hf_attnkit.models.discovery import discover
from hf_attnkit.models.token_ids import require_known_tokens

WRONG = {"input_ids": torch.tensor([[1, 2, 500]])}
MESSAGE = r"input_ids holds the token id 500, and the vocabulary of \w+ has ids from 0 to 98 \(vocab_size=99\)"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_batches_and_probes(model_type: str) -> None:
    model = small_model(model_type)
    for call in (
        lambda: head_importance(model, [WRONG]),
        lambda: head_statistics(model, [WRONG]),
        lambda: convert_to_gqa(model, 1, calibration=[WRONG]),
        lambda: prune_heads(model, {0: [0, 1]}, calibration=[WRONG]),
        lambda: prune_heads(model, {0: [0, 1]}, probe=WRONG),
        lambda: set_probe(model, WRONG),
        lambda: describe_attention(model, probe=WRONG),
    ):
        with unchanged(model), pytest.raises(ValueError, match=MESSAGE):
            call()


def test_negative_ids_and_those_of_a_decoder() -> None:
    model = small_model("bart")
    inputs: dict[str, Any] = discover(model).inputs
    with pytest.raises(ValueError, match=r"decoder_input_ids holds the token id -100"):
        head_importance(model, [inputs | {"decoder_input_ids": torch.full((2, 4), -100)}])
    with pytest.raises(ValueError, match=r"input_ids holds the token id -1,"):
        head_importance(small_model("opt"), [{"input_ids": torch.full((2, 4), -1)}])


def test_placeholders_and_models_without_a_table() -> None:
    model = small_model("llava")
    model.config.image_token_id = 10**4
    require_known_tokens(model, {"input_ids": torch.tensor([[1, 10**4]])})
    with pytest.raises(ValueError, match="token id 10001"):
        require_known_tokens(model, {"input_ids": torch.tensor([[1, 10**4 + 1]])})
    require_known_tokens(small_model("canine"), {"input_ids": torch.tensor([[10**6]])})
    require_known_tokens(small_model("vit"), {"pixel_values": torch.zeros(1)})
