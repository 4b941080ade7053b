"""Scores of models whose layers look at two sequences: whose padding counts, and whose labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.every_type import small_model
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from hf_attnkit import head_gradients, head_importance

LOSSES = ("gradient", "taylor", "fisher")


def decoder() -> BertLMHeadModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                        is_decoder=True, add_cross_attention=True, initializer_range=0.3)  # fmt: skip
    return BertLMHeadModel(config).eval()


@pytest.mark.parametrize("others", [7, 10])
def test_padded_queries_of_a_decoder_do_not_count(others: int) -> None:
    model = decoder()
    ids, mask = torch.randint(6, 64, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, -4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": torch.randn(3, others, 32)}
    changed = batch | {"input_ids": ids.masked_fill(mask == 0, 9)}
    assert torch.equal(*(head_importance(model, [each], method="entropy") for each in (batch, changed)))


def test_padded_queries_of_an_encoder_decoder_do_not_count() -> None:
    model = small_model("bart")
    ids, mask = torch.randint(6, 64, (2, 9)), torch.ones(2, 6, dtype=torch.long)
    mask[1, -2:] = 0
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :6], "decoder_attention_mask": mask}
    changed = batch | {"decoder_input_ids": ids[:, :6].masked_fill(mask == 0, 9)}
    assert torch.equal(*(head_importance(model, [each], method="entropy") for each in (batch, changed)))


def by_definition(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean over examples of the size of the gradient of its own loss by each head's gate, of the first layer."""
    rows = []
    for row in range(2):
        seen = batch["attention_mask"][row].bool()
        one = {"input_ids": batch["input_ids"][row : row + 1, seen], "labels": batch["labels"][row : row + 1]}
        gate = torch.ones(4, dtype=torch.float64, requires_grad=True)

        def scale(_: Any, args: Any, gate: Tensor = gate) -> Any:
            return (args[0].unflatten(-1, (4, -1)) * gate[:, None]).flatten(-2), *args[1:]

        handle = model.encoder.block[0].layer[0].SelfAttention.o.register_forward_pre_hook(scale)
        rows.append(torch.autograd.grad(model(**one).loss, gate)[0].abs())
        handle.remove()
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("length", [9, 6])
def test_labels_are_the_decoder_s(length: int) -> None:
    """However long they are, and wherever the encoder's text is padded."""
    model = small_model("t5").double()
    model.config.decoder_start_token_id = 0
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -3:] = 0
    labels = torch.randint(3, 60, (2, length))
    labels[0, -2:] = -100
    batch = {"input_ids": torch.randint(3, 60, (2, 9)), "attention_mask": mask, "labels": labels}
    scores = head_importance(model, [batch], method="gradient")
    torch.testing.assert_close(scores[0].double(), by_definition(model, batch), rtol=1e-5, atol=0)
    for method in LOSSES:
        assert head_importance(model, [batch], method=method).isfinite().all()


@pytest.mark.parametrize("method", ["entropy", "contribution"])
@pytest.mark.parametrize("model_type", ["bart", "t5", "whisper"])
def test_a_decoder_reads_labels(model_type: str, method: str) -> None:
    """As collators give them: of different lengths, no other inputs of the decoder, and no mask of its padding."""
    model = small_model(model_type)
    start = model.config.decoder_start_token_id = 1
    labels = torch.randint(3, 60, (3, 7))
    labels[0, 4:] = labels[1, 5:] = -100
    takes_sound = model_type == "whisper"
    given = {"input_features": torch.randn(3, 16, 32)} if takes_sound else {"input_ids": torch.randint(3, 60, (3, 9))}
    name = next(iter(given))
    alone = []
    for row, own in enumerate(labels):
        decoder = torch.cat([torch.tensor([start]), own[own != -100][:-1]])
        alone.append({name: given[name][row : row + 1], "decoder_input_ids": decoder[None]})
    found = head_importance(model, [given | {"labels": labels}], method=method)
    torch.testing.assert_close(
        found, head_importance(model, alone, method=method), rtol=1e-4, atol=1e-6, equal_nan=True
    )


def test_answers_of_a_decoder() -> None:
    """To what it reads by its labels, and none at its padding."""
    model = small_model("bart")
    start = model.config.decoder_start_token_id
    ids, labels = torch.randint(3, 60, (3, 9)), torch.randint(3, 60, (3, 7))
    labels[0, 4:] = -100
    read = torch.cat([torch.full((3, 1), start), labels[:, :-1]], 1)
    alone = [
        {"input_ids": ids[row : row + 1], "decoder_input_ids": read[row : row + 1, : (labels[row] != -100).sum()]}
        for row in range(3)
    ]
    found = head_gradients(model, [{"input_ids": ids, "labels": labels}], labels="predicted")
    torch.testing.assert_close(found, head_gradients(model, alone, labels="predicted"), rtol=1e-4, atol=1e-8)
    whisper = small_model("whisper")
    with pytest.raises(ValueError, match=r"answers of WhisperForConditionalGeneration to decoder_input_ids"):
        head_gradients(whisper, [{"input_features": torch.randn(2, 16, 32), "labels": labels}], labels="predicted")
