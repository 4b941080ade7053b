"""attention.html: what the heads attend to before and after a run, on three examples of the dev set.

They are examples whose answer changed, of the first `ANSWERED`; else the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_attnkit.analysis.attention_view import attention_view
from hf_attnkit.analysis.entropy_callback import core_model
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.experiment.report.page import ATTENTION
from hf_attnkit.observing.batches import to_device

if TYPE_CHECKING:
    from hf_attnkit.experiment.run import Run

logger = logging.get_logger(__name__)

EXAMPLES = 3
ANSWERED = 128


def write_attention_page(run: Run) -> Path | None:
    """Write `attention.html` next to the report; `None` where nothing was changed or measured, or cannot be seen.

    The untouched model is loaded again, as for the timing.
    """
    if run.done is None or not run.stages or run.sharded or hasattr(core_model(run.model), "peft_config"):
        return None
    after = core_model(run.model)
    before = run.load_untouched().to(after.device)
    collate = run.trainer_options()["data_collator"]
    rows, why = _shown(run.eval_data, collate, before, after)
    stage = run.stages[-1]["stage"]
    try:
        view = attention_view(
            before, collate([run.eval_data[row] for row in rows]), run.tokenizer, compare=after,
            names=("untouched", stage if stage != "control" else "changed"),
            title=f"Attention before and after: {run.done.title}",
        )  # fmt: skip
    except ValueError as error:
        logger.warning("no page of attention: %s", error)
        return None
    return view.noted(why).save(run.output / ATTENTION)


def _shown(data: Sequence[Any], collate: Any, before: PreTrainedModel, after: PreTrainedModel) -> tuple[list[int], str]:
    """Which examples, and why these."""
    first = list(range(min(EXAMPLES, len(data))))
    changed: list[int] = []
    for start in range(0, min(ANSWERED, len(data)), 32):
        rows = range(start, min(start + 32, ANSWERED, len(data)))
        batch = collate([data[row] for row in rows])
        was, now = (_answers(model, batch) for model in (before, after))
        if was is None or now is None:
            return first, "The first examples of the dev set."
        changed += [row for row, differs in zip(rows, (was != now).tolist(), strict=True) if differs]
        if len(changed) >= EXAMPLES:
            break
    if not changed:
        return first, "The first examples of the dev set: no answer of those that were looked at changed."
    rest = [row for row in range(len(data)) if row not in changed]
    shown = (changed + rest)[:EXAMPLES]
    return shown, f"Examples {', '.join(map(str, shown))} of the dev set; the answer changed in {min(len(changed), 3)}."


def _answers(model: PreTrainedModel, batch: Any) -> Tensor | None:
    """The class of each example, `(batch,)`; `None` for models that give none."""
    with torch.no_grad(), evaluation_mode(model):
        logits = getattr(model(**to_device(batch, model)), "logits", None)
    classes = isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 1
    return logits.argmax(-1).cpu() if classes and logits is not None else None
