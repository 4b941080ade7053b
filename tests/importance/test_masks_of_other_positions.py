"""Masks of samples where attention is of frames, and of texts where it is of whole windows: padding counts nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.every_type import small_config
from torch import Tensor
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    PreTrainedModel,
    SEWConfig,
    SEWForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_attnkit import head_importance, prune_heads
from hf_attnkit.models.layers import attention_layers

KINDS: dict[str, tuple[type[PreTrainedModel], Any, str, int]] = {
    "sound": (Wav2Vec2ForSequenceClassification, Wav2Vec2Config, "input_values", 3200),
    "windows": (LongformerForSequenceClassification, LongformerConfig, "input_ids", 12),
    "squeezed": (SEWForSequenceClassification, SEWConfig, "input_values", 3200),
}


def problem(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor], list[dict[str, Tensor]]]:
    """A model, a padded batch, and its rows alone."""
    torch.manual_seed(0)
    model_class, config_class, name, length = KINDS[kind]
    config = small_config(config_class)
    config.feat_extract_norm = "layer"
    model = model_class(config).eval()
    given = torch.randint(3, 60, (2, length)) if name == "input_ids" else torch.randn(2, length)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    inputs = {name: given * mask, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    alone = [{n: x[row : row + 1, : mask[row].sum()] if x.dim() > 1 else x[row : row + 1] for n, x in inputs.items()}
             for row in range(2)]  # fmt: skip
    return model, inputs, alone


@pytest.mark.parametrize("method", ["contribution", "gradient"])
@pytest.mark.parametrize("kind", ["sound", "windows"])
def test_as_without_padding(kind: str, method: str) -> None:
    model, inputs, alone = problem(kind)
    together, apart = (head_importance(model, batches, method=method) for batches in ([inputs], alone))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-9)


def test_a_refit_on_sound() -> None:
    model, inputs, alone = problem("sound")
    report = prune_heads(model, {0: [1]}, calibration=[inputs, *alone])
    assert attention_layers(report)[0].num_heads == 3


def test_what_is_not_known_is_refused() -> None:
    model, inputs, _ = problem("squeezed")
    with pytest.raises(ValueError, match=r"got \(2, 3200\). Give batches of one length without it"):
        head_importance(model, [inputs], method="contribution")
