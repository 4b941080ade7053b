"""Whether a loss compares what is put out for a token with its own label or the next one's is seen, not assumed."""

from __future__ import annotations

import pytest
import torch
from support.every_type import small_config, small_model
from support.models import batch, build
from torch import Tensor
from transformers import CONFIG_MAPPING, BartForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_attnkit import head_gradients
from hf_attnkit.models.layers import attention_layers


class OwnLlama(LlamaForCausalLM):
    """A user's."""


def alone(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each text without its padding."""
    return [
        {name: x[row : row + 1, mask] if x.shape == inputs["input_ids"].shape else x[row : row + 1]
         for name, x in inputs.items()}
        for row, mask in enumerate(inputs["attention_mask"].bool())
    ]  # fmt: skip


@pytest.mark.parametrize("labels", ["none", "given", "predicted"])
def test_a_class_of_ones_own(labels: str) -> None:
    stock = build("llama", "causal", 8, 2)
    own = OwnLlama(stock.config).eval()
    own.load_state_dict(stock.state_dict())
    inputs = batch(stock)
    if labels == "given":
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    word = "predicted" if labels == "predicted" else "given"
    expected = head_gradients(stock, alone(stock, inputs), labels=word)
    torch.testing.assert_close(head_gradients(own, [inputs], labels=word), expected, rtol=1e-3, atol=1e-6)


def test_text_next_to_images() -> None:
    """Of different lengths, on the left of which is padding: each counts the labels that its loss counts."""
    model = small_model("qwen2_vl")
    ids, mask = torch.randint(3, 60, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :8] = mask[1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = head_gradients(model, alone(model, inputs))
    torch.testing.assert_close(head_gradients(model, [inputs]), expected, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("labels", ["none", "given"])
def test_a_decoder_whose_loss_does_not_shift(labels: str) -> None:
    """Without labels it learns the next token, as all causal models do; labels that are given are where it wants them.

    BART's decoder alone compares what it puts out for a token with that token's label.
    """
    torch.manual_seed(0)
    config = small_config(CONFIG_MAPPING["bart"])
    config.is_decoder, config.dropout = True, 0.0
    model = BartForCausalLM(config).double().eval()
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": torch.randn(2, 5, 32).double()}
    if labels == "given":
        inputs["labels"] = torch.randint(3, 60, (2, 9))
    found = head_gradients(model, [inputs])
    layers = attention_layers(model)
    for row, one in enumerate(alone(model, inputs)):
        gates = [torch.ones(layer.num_heads, dtype=torch.float64, requires_grad=True) for layer in layers]
        handles = [
            layer.output.register_forward_pre_hook(
                lambda _, args, gate=gate: ((args[0].unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2),)
            )
            for layer, gate in zip(layers, gates, strict=True)
        ]
        wanted = one.pop("labels", None)
        scores = model(**one).logits[0].log_softmax(-1)
        pairs = (scores[:-1], one["input_ids"][0, 1:]) if wanted is None else (scores, wanted[0])
        expected = torch.autograd.grad(-pairs[0].gather(1, pairs[1][:, None]).mean(), gates)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found[row].double(), torch.stack(expected), rtol=1e-5, atol=1e-9)
