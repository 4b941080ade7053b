"""Qwen2-VL: the patches of all images of a batch are one row next to its texts."""

from __future__ import annotations

import pytest
import torch
from support.every_type import small_model
from support.unchanged import unchanged
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import head_gradients, head_importance, prune_heads, set_probe
from hf_attnkit.editing.proof import heads_changed
from hf_attnkit.models.discovery import discover
from hf_attnkit.observing.rows import num_rows, rows_of


def problem(number: int, seed: int = 0) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and so many texts with an image each, of 16 patches that become four tokens."""
    model = small_model("qwen2_vl")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (number, 14), generator=generator)
    ids[:, 3:7] = model.config.image_token_id
    vision = model.config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16 * number, size, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * number),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    set_probe(model, inputs)
    return model, inputs


def test_gradients_of_one_example() -> None:
    """Against differences of the loss, of a layer of the image and one of the text."""
    model, inputs = problem(1)
    inputs["labels"] = inputs["input_ids"]
    gradients = head_gradients(model, [inputs])[0]
    attentions = discover(model, inputs).attentions
    for layer in (0, 2):
        losses = []
        for change in (1e-2, -1e-2):
            factor = torch.ones(4)
            factor[1] += change
            with heads_changed(model, attentions, {layer: factor}, {}), torch.no_grad():
                losses.append(model(**inputs).loss.double())
        assert float(losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradients[layer, 1]), abs=1e-4)
    model, inputs = problem(2)
    inputs["labels"] = inputs["input_ids"]
    with unchanged(model), pytest.raises(ValueError, match=r"2 examples in 1 rows.*give batches of one example"):
        head_importance(model, [inputs], method="gradient")


def test_a_refit_on_batches_of_one_text() -> None:
    """One text is one sequence, however many patches its image has."""
    model, inputs = problem(1)
    assert num_rows(inputs) == 1 and rows_of(inputs, [0]) == inputs
    prune_heads(model, {0: [1]}, calibration=[problem(1, seed)[1] for seed in range(3)])
    assert discover(model, inputs).attentions[0].num_heads == 3
