"""What commands do less of in tests: the numbers of repetitions that only a reader of their results needs."""

from __future__ import annotations

import torch._dynamo

from hf_attnkit.experiment import timing
from hf_attnkit.experiment.benchmarking import measure
from hf_attnkit.experiment.report import attention_page

EXAMPLES = attention_page.EXAMPLES


def configure() -> None:
    """A timed sample is one call, stages are timed twice, a page of attention shows one example.

    Tests of any of them set what they need.
    """
    # PyTorch times what it checks before each compiled function, on an emptied cache, for a log.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    measure.SAMPLE = 1e-9
    timing.REPEATS = 2
    attention_page.EXAMPLES = 1
