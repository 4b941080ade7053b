"""A new score is one class and one line in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from support.models import batch, build
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit import head_importance
from hf_attnkit.importance import METHODS
from hf_attnkit.importance.methods.gradient import Gradient
from hf_attnkit.importance.score import Batches, Score, ScoreOfLoss
from hf_attnkit.models.layers import AttentionLayer


@dataclass(frozen=True)
class Place(Score):
    """The head's number, times a factor."""

    name = "place"
    needs_batches = False

    factor: int = 1

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        return [self.factor * torch.arange(layer.num_heads).float() for layer in layers]


@dataclass(frozen=True)
class NegativeGradient(ScoreOfLoss):
    """Shares the options of every score of the loss."""

    name = "negative_gradient"

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        return [-score for score in Gradient(self.labels).score(model, layers, batches)]


def test_documented_are_all_scores_and_their_options() -> None:
    text = (Path(__file__).parents[2] / "docs" / "importance.md").read_text()
    table = text.split("| method | score of head h |")[1].split("\n\n")[0]
    rows = [line.split("|")[1].strip(" `") for line in table.splitlines()[2:]]
    assert sorted(rows) == sorted(METHODS)
    for score in METHODS.values():
        for field in fields(score):
            assert f"`{field.name}=" in text or f"`{field.name}`" in text, f"option {field.name} of {score.name}"


@pytest.fixture
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for score in (Place, NegativeGradient):
        monkeypatch.setitem(METHODS, score.name, score)


@pytest.mark.usefixtures("_listed")
def test_a_new_score() -> None:
    model = build("llama", "causal")
    assert torch.equal(head_importance(model, method="place", factor=3), 3.0 * torch.arange(8).expand(2, -1))
    inputs = [batch(model)]
    gradient = head_importance(model, inputs, method="gradient", labels="predicted")
    assert torch.equal(head_importance(model, inputs, method="negative_gradient", labels="predicted"), -gradient)


@pytest.mark.usefixtures("_listed")
def test_its_options_are_checked() -> None:
    model = build("llama", "causal")
    with pytest.raises(ValueError, match="importance method 'place' has no option labels; it takes factor"):
        head_importance(model, method="place", labels="given")
    with pytest.raises(ValueError, match="labels='none' must be one of 'given', 'predicted'"):
        head_importance(model, [batch(model)], method="negative_gradient", labels="none")
    with pytest.raises(ValueError, match="'negative_gradient' looks at data; give batches"):
        head_importance(model, method="negative_gradient")
