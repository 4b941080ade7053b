"""What commands do less of in tests: the numbers of repetitions that only a reader of their results needs."""

from __future__ import annotations

from hf_attnkit.experiment.benchmarking import measure
from hf_attnkit.experiment.report import attention_page

EXAMPLES = attention_page.EXAMPLES


def configure() -> None:
    """A timed sample is one call, and a page of attention shows one example; tests of either set what they need."""
    measure.SAMPLE = 1e-9
    attention_page.EXAMPLES = 1
