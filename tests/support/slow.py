"""What only tests marked `slow` do: `make check` leaves them out and takes under two minutes.

A test is slow by what it does, not by a clock, which a busy machine would decide: it starts Python processes, trains
for more than a few steps, or runs a recipe on a checkpoint of its own. The first two are watched here, so that a test
that does them without the mark fails and says so; the third gets the mark by itself, and so do the cases of a test
beyond the first few, drawn by the test's name. What takes long for another reason is marked by hand.
"""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import Trainer

FEW_STEPS = 8
FEW_CASES = 2
# The fixtures that hold a recipe's model; test_documented_commands.py runs each recipe once, quickly.
OF_RECIPES = ("checkpoint", "text_checkpoint")
_now: list[pytest.Item] = []


def mark(items: Sequence[pytest.Item]) -> None:
    """Give the mark to what runs a recipe, and to cases beyond the first few, the same ones in every run."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for name, alike in cases.items():
        more = random.Random(name).sample(alike, max(len(alike) - FEW_CASES, 0))
        for item in [*more, *filter(runs_a_recipe, alike)]:
            item.add_marker(pytest.mark.slow)


def runs_a_recipe(item: pytest.Item) -> bool:
    return bool(set(OF_RECIPES) & set(getattr(item, "fixturenames", ())))


@contextmanager
def running(item: pytest.Item) -> Iterator[None]:
    """The block is this test, its fixtures included."""
    _now.append(item)
    try:
        yield
    finally:
        _now.remove(item)


def only_if_slow(what: str) -> None:
    """Fail the running test if it is not marked."""
    for item in _now:
        if item.get_closest_marker("slow") is None:
            pytest.fail(f"{item.name} {what}: mark it slow (@pytest.mark.slow)", pytrace=False)


def watch() -> None:
    """From here on, processes and trainings ask whether the running test is slow."""
    start, train = subprocess.Popen.__init__, Trainer.train

    @functools.wraps(start)
    def watched_start(self: Any, args: Any, *others: Any, **options: Any) -> None:
        words = [args] if isinstance(args, str | bytes) else list(args)
        if str(words[0]) == sys.executable:
            only_if_slow("starts a Python process")
        start(self, args, *others, **options)

    @functools.wraps(train)
    def watched_train(self: Any, *arguments: Any, **options: Any) -> Any:
        result = train(self, *arguments, **options)
        if self.state.global_step > FEW_STEPS:
            only_if_slow(f"trains {self.state.global_step} steps, more than {FEW_STEPS}")
        return result

    subprocess.Popen.__init__ = watched_start  # type: ignore[method-assign]
    Trainer.train = watched_train  # type: ignore[method-assign]
