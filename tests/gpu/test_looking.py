"""Scores, statistics and the attention view on a GPU: the CPU's values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gpu import DEVICE, needs_gpu, there
from support.importances import tolerance
from support.models import batch, build
from torch import Tensor

from hf_attnkit import attention_view, head_importance, head_statistics
from hf_attnkit.importance import METHODS
from hf_attnkit.models.known import known

pytestmark = needs_gpu

STATISTICS = ("entropy", "confidence", "distance", "previous", "next", "first", "redundancy")


def example(family: str) -> tuple[Any, list[dict[str, Tensor]]]:
    model = build(family, "sequence", 8, 4) if family == "llama" else build(family, "sequence")
    return model, [batch(model, seed=seed) | {"labels": torch.tensor([0, 1, 0])} for seed in range(2)]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", list(METHODS))
def test_scores(method: str, family: str) -> None:
    if (method, family) == ("reach", "bert"):
        pytest.skip("of causal models")
    model, batches = example(family)
    want = head_importance(model, batches, method=method)
    found = head_importance(there(model), batches, method=method)
    assert found.device.type == "cpu"
    # Sums over the tokens of the batches are as large as the largest score; `l0` trains on them for many steps.
    scale = max(1.0, float(want.nan_to_num().abs().max())) * (100 if method == "l0" else 1)
    torch.testing.assert_close(found, want, rtol=0, atol=tolerance(scale), equal_nan=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_statistics(family: str) -> None:
    model, batches = example(family)
    want, found = head_statistics(model, batches), head_statistics(there(model), batches)
    for name in STATISTICS:
        scale = 13.0 if name == "distance" else 3.0
        torch.testing.assert_close(
            getattr(found, name), getattr(want, name), rtol=0, atol=tolerance(scale), equal_nan=True
        )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_view(family: str) -> None:
    model, (inputs, _) = example(family)
    want, found = attention_view(model, inputs), attention_view(there(model), there(inputs))
    for one, other in zip(found.examples, want.examples, strict=True):
        for ours, theirs in zip(one.maps, other.maps, strict=True):
            torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=tolerance())


def test_a_model_that_moved_is_looked_at_again() -> None:
    """What it was run on is where it was; a Trainer moves the model."""
    model = build("llama", "sequence", 8, 4)
    before = known(model)
    assert known(model) is before
    inputs = known(model.to(DEVICE)).discovery.inputs
    assert {value.device.type for value in inputs.values() if isinstance(value, torch.Tensor)} == {DEVICE}
