"""Python's garbage collector, and why tests tell it what stays."""

from __future__ import annotations

import gc
import time

# Seconds of work after which there is much that is new: a type of model, or a recipe, brings modules of its own.
MUCH = 5
_frozen_at = 0.0


def freeze() -> None:
    """What lives now stays to the end: the collector, and who asks it for referrers, need not walk through it again.

    Collected tests and the modules of Transformers are a million objects, through which each full collection and each
    search for the model that a part belongs to would walk.
    """
    global _frozen_at
    gc.collect()
    gc.freeze()
    _frozen_at = time.process_time()


def freeze_now_and_then() -> None:
    """Freeze where much was done since the last time."""
    if time.process_time() - _frozen_at > MUCH:
        freeze()


def rarely() -> None:
    """Collect less often than after each 700 new objects: a small model is thousands of them."""
    gc.set_threshold(50_000, 20, 20)
