"""What the last change of a model's heads did.

Kept next to the model and not on it, so that saving, pickling and copying a model know nothing of it. A copy of a
model has no last change.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from hf_attnkit.attention.paged import refuse_paged_cache


@dataclass(frozen=True)
class ChangeReport:
    """What a change of heads did; prints as a table. Holds numbers only, not the model.

    Attributes:
        heads_before, heads_after: per layer `(num_attention_heads, num_key_value_heads)`; (0, 0) where there are none.
    """

    heads_before: tuple[tuple[int, int], ...]
    heads_after: tuple[tuple[int, int], ...]


_REPORTS: WeakKeyDictionary[PreTrainedModel, ChangeReport] = WeakKeyDictionary()


def record_change(model: PreTrainedModel, report: ChangeReport) -> None:
    """Note what a change did to the model; `last_change` gives it."""
    _REPORTS[model] = report
    refuse_paged_cache(model, [max(1, groups) for _, groups in report.heads_after])  # a stand-in is one head


def last_change(model: PreTrainedModel) -> ChangeReport | None:
    """What the last conversion or pruning of this model object did, in this process; `None` if there was none.

        convert_to_gqa(model, 4, calibration=batches)
        print(last_change(model))  # layer by layer: heads, predicted losses, what the refit reached

    Returns:
        A `ConversionReport` or a `PruningReport`. It is neither saved nor copied with the model.
    """
    return _REPORTS.get(model)
