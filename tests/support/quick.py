"""What commands do less of in tests: the numbers of repetitions that only a reader of their results needs."""

from __future__ import annotations

from hf_attnkit.experiment import timing
from hf_attnkit.experiment.benchmarking import measure
from hf_attnkit.experiment.report import attention_page

EXAMPLES = attention_page.EXAMPLES


def configure() -> None:
    """A timed sample is one call, stages are timed twice, a page of attention shows one example.

    Tests of any of them set what they need.
    """
    measure.SAMPLE = 1e-9
    timing.REPEATS = 2
    attention_page.EXAMPLES = 1
