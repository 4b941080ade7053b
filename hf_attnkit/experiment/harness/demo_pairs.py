"""The demo grammar's minimal pairs as a task of lm-evaluation-harness: which of two sentences is more likely?"""

from __future__ import annotations

from typing import Any

import datasets

from hf_attnkit.experiment.glue.demo_data import make_pairs


def load(**_: Any) -> datasets.DatasetDict:
    """250 pairs, `acceptable` and `unacceptable`, the same ones each time."""
    rows = [vars(pair) for pair in make_pairs("validation")]
    return datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)})
