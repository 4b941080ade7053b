"""Stages timed alternately: which models are run, and what is reported, under a clock that counts heads."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import create_autospec

import pytest
from support.models import batch, build
from transformers import Trainer, TrainingArguments

import hf_attnkit
from hf_attnkit.experiment import timing
from hf_attnkit.experiment.evaluating import describe
from hf_attnkit.models.layers import attention_layers


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of heads of the two models of each comparison; a pass takes a millisecond a head."""
    seen: list[list[int]] = []

    def forward(model: Any, trainer: Trainer, inputs: Any) -> Any:
        return lambda: sum(len(layer.heads) for layer in attention_layers(model))

    def alternately(calls: Any, repeats: int, device: Any, step: Any = None) -> dict[str, list[float]]:
        seen.append([call() for call in calls.values()])
        return {name: [1e-3 * call()] * repeats for name, call in calls.items()}

    monkeypatch.setattr(timing, "_forward", create_autospec(timing._forward, side_effect=forward))
    fake = create_autospec(timing.time_alternately, side_effect=alternately)
    monkeypatch.setattr(timing, "time_alternately", fake)
    return seen


def test_each_changed_model_runs_against_the_first(clocked, tmp_path) -> None:
    first = build("bert")
    smaller = hf_attnkit.prune_heads(copy.deepcopy(first), {0: [0]})
    last = hf_attnkit.prune_heads(copy.deepcopy(smaller), {1: [0, 1]})
    total = sum(len(layer.heads) for layer in attention_layers(first))
    names = (("baseline", first), ("changed", smaller), ("recovered", smaller), ("changed", last), ("lost", None))
    stages = [{"stage": name, **(describe(model) if model else {**describe(last), "parameters": 1})}
              for name, model in names]  # fmt: skip
    trainer = Trainer(model=first, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    models = [lambda: first, lambda: smaller, lambda: last]
    label = lambda stage: stage["stage"]  # noqa: E731
    found = timing.time_stages(stages, models, trainer, batch(first), device="here", label=label, repeats=3)
    assert clocked == [[total, total - 1], [total, total - 3]]
    assert found is not None and (found["repeats"], found["device"]) == (3, "here")
    shares = [(stage["stage"], stage["ratio"]["median"], stage["milliseconds"]["median"]) for stage in found["stages"]]
    one, two = (total - 1) / total, (total - 3) / total
    expected = [("baseline", 1.0), ("changed", one), ("recovered", one), ("changed", two)]
    assert shares == [(name, pytest.approx(ratio), pytest.approx(ratio * total)) for name, ratio in expected]
    # One model alone, or a first stage that is not at hand, is nothing to compare.
    assert timing.time_stages(stages[:1], models, trainer, batch(first), device="", label=label) is None
    assert timing.time_stages(stages[1:], models, trainer, batch(first), device="", label=label) is None
