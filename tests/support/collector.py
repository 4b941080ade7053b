"""Python's garbage collector, and why tests tell it what stays."""

from __future__ import annotations

import gc


def freeze() -> None:
    """What lives now stays to the end: the collector, and who asks it for referrers, need not walk through it again.

    Collected tests and the modules of Transformers are a million objects, through which each full collection and each
    search for the model that a part belongs to would walk.
    """
    gc.collect()
    gc.freeze()


def rarely() -> None:
    """Collect less often than after each 700 new objects: a small model is thousands of them."""
    gc.set_threshold(50_000, 20, 20)
