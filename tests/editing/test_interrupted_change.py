"""A change of heads that fails on the way, at any step, leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import batch, build, outputs
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, prune_heads
from hf_attnkit.editing import change as change_module
from hf_attnkit.editing import projections
from hf_attnkit.models import layers

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


# Parameters are made one by one inside `apply`, so the fourth row fails between a weight and its bias.
STEPS = {
    "apply": (projections, "apply"),
    "attributes": (change_module, "set_attributes"),
    "config": (change_module, "write_heads"),
    "check": (layers, "check_heads"),
    "parameter": (projections, "_parameter"),
}


@pytest.mark.parametrize("step", STEPS)
@both_families
@every_change
def test_failure_at_every_step(change: Callable, family: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = STEPS[step]
    original = getattr(module, name)
    n, stopped = 1, 0
    while True:
        model = build(family)
        inputs = batch(model)
        expected = outputs(model, inputs)
        calls: list[int] = []
        monkeypatch.setattr(module, name, fails_at(original, n, calls))
        try:
            with unchanged(model), pytest.raises(Stop):
                change(model)
        except pytest.fail.Exception:  # no step left to fail at
            assert len(calls) == n - 1
            break
        monkeypatch.setattr(module, name, original)
        assert torch.equal(outputs(model, inputs), expected), n
        stopped += 1
        n += 1
    assert stopped >= 2
