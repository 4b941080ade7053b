"""A change of heads that fails on the way, at any step, leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import batch, build, outputs
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, prune_heads
from hf_attnkit.editing import cut_heads, projections, proof, saved_cut, undo

CHANGES = {
    "gqa": lambda m: convert_to_gqa(m, 2),
    "prune": lambda m: prune_heads(m, {0: [0, 1], 1: [2, 3, 4, 5]}),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
both_families = pytest.mark.parametrize("family", ["bert", "llama"])


class Stop(BaseException):
    """As KeyboardInterrupt: no `Exception`."""


def fails_at(function: Callable, n: int, calls: list[int]) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == n:
            raise Stop
        return function(*args, **kwargs)

    return wrapped


STEPS = {
    "every field, parameter and module": (undo.Undo, "set"),
    "apply": (projections, "apply"),
    "parameter": (projections, "_parameter"),  # between a weight and its bias
    "numbers": (cut_heads, "settle"),
    "proof": (proof.Zeroed, "difference"),
    "record": (saved_cut, "record"),
    "stock fields": (saved_cut, "into_stock_fields"),
}
TRIES = 6  # of the steps of a name


@pytest.mark.parametrize("step", STEPS)
@both_families
@every_change
def test_failure_at_many_steps(change: Callable, family: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = STEPS[step]
    original = getattr(module, name)
    calls: list[int] = []
    monkeypatch.setattr(module, name, fails_at(original, 0, calls))
    model = build(family)
    change(copy.deepcopy(model))
    total = len(calls)
    assert total or (change is CHANGES["prune"] and module is projections)
    expected = outputs(model, batch(model))
    for n in range(1, total + 1, max(1, total // TRIES)):
        calls.clear()
        monkeypatch.setattr(module, name, fails_at(original, n, calls))
        with unchanged(model), pytest.raises(Stop):
            change(model)
        monkeypatch.setattr(module, name, original)
        assert torch.equal(outputs(model, batch(model)), expected), n
