"""Blocks that add the residual stream in place: what a walk keeps must not change under it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.any_model import any_model
from support.calibrated import batches_for
from support.refits import plain
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from hf_attnkit import RefitOptions, last_change, prune_heads


def block(adds: str) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        residual = hidden_states
        hidden, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if adds == "to the attention's output":
            hidden += residual
        elif adds == "to the stream":
            residual += hidden
            hidden = residual
        else:
            hidden = hidden + residual
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    return forward


@pytest.mark.parametrize("adds", ["to the attention's output", "to the stream"])
def test_a_refit_is_that_of_the_same_model_without(adds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for way in ("out of place", adds):
        monkeypatch.setattr(MixtralDecoderLayer, "forward", block(way))
        model = copy.deepcopy(any_model("mixtral"))
        prune_heads(model, {0: [0, 1], 1: [0, 1]}, calibration=batches_for(model), refit=plain("output"))
        report = last_change(model).refit  # type: ignore[union-attr]
        errors.append([(layer.error_before, layer.error_after) for layer in report.layers])
    assert errors[0] == errors[1]


def test_without_a_gradient_all_tokens_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is changed in place after something was computed from it; the report says how tokens were taken."""
    words = []
    for way in ("out of place", "to the stream"):
        monkeypatch.setattr(MixtralDecoderLayer, "forward", block(way))
        model = copy.deepcopy(any_model("mixtral"))
        options = RefitOptions("output", token_weights="gradient")
        prune_heads(model, {0: [0, 1]}, calibration=batches_for(model), refit=options)
        report = last_change(model).refit  # type: ignore[union-attr]
        words.append(report.token_weights)
        assert all((layer.share is None) == (words[-1] == "uniform") for layer in report.layers)
    assert words == ["gradient", "uniform"]
