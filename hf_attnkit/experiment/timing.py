"""Time a run's models next to each other, once its stages are measured.

Stages are minutes or hours apart, and a machine is not the same after that long. So their models run alternately at the
end, each changed model with the first one, and what is reported is the ratio of their times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.experiment.benchmarking.measure import quartiles, time_alternately
from hf_attnkit.experiment.evaluating import describe, signature

REPEATS = 9
BATCHES = 8

Model = Callable[[], PreTrainedModel]


def longest_batch(trainer: Trainer, data: Any) -> dict[str, Any]:
    """Of the first `BATCHES` evaluation batches the one of the most tokens, on the trainer's device.

    Every process has to call it; each gets one of its own share.
    """
    args = trainer.args
    rows = min(BATCHES * args.eval_batch_size * args.world_size, len(data))
    # Run to its end: accelerate remembers a loader that is left early, and training would take its state for its own.
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader(Subset(data, range(rows)))]
    longest: dict[str, Any] = max(batches, key=lambda batch: batch["input_ids"].numel())
    return longest


def time_stages(
    stages: Sequence[dict[str, Any]],
    models: Sequence[Model],
    trainer: Trainer,
    batch: Mapping[str, Any],
    *,
    device: str,
    label: Callable[[Mapping[str, Any]], str],
    repeats: int | None = None,
) -> dict[str, Any] | None:
    """Forward passes of the stages' models, each timed alternately with that of the first stage.

    Stages whose models differ in their weights alone share one measurement. At most two models are in memory at a time.

    Args:
        stages: as results.json has them.
        models: what makes each model of the run, the first stage's first; a stage of which there is none is left out.
        trainer: says how a model runs: its device and precision.
        batch: inputs of a forward pass.
        device: what the machine is called.
        label: what a stage is called.
        repeats: of each measurement; by default `REPEATS`.

    Returns:
        What results.json holds as "timing"; `None` where there are no two models to compare.
    """
    repeats = REPEATS if repeats is None else repeats
    wanted = [signature(stage) for stage in stages]
    if len(set(wanted)) < 2:
        return None
    first = models[0]().to(trainer.args.device)
    if signature(describe(first)) != wanted[0]:
        return None
    found: dict[tuple[Any, ...], list[float]] = {}
    base: list[float] = []
    for make in models[1:]:
        model = make().to(trainer.args.device)
        key = signature(describe(model))
        if key in found or key == wanted[0] or key not in wanted:
            continue
        calls = {name: _forward(one, trainer, batch) for name, one in (("first", first), ("other", model))}
        seconds = time_alternately(calls, repeats, trainer.args.device)
        found[key] = [other / one for one, other in zip(seconds["first"], seconds["other"], strict=True)]
        base += seconds["first"]
        del model, calls
    if not found:
        return None
    milliseconds = 1e3 * quartiles(base)[1]
    found[wanted[0]] = [1.0]
    rows, tokens = batch["input_ids"].shape
    return {
        "batch_size": rows,
        "sequence_length": tokens,
        "repeats": repeats,
        "device": device,
        "stages": [
            {"stage": label(stage), **spread(found[key], milliseconds)}
            for stage, key in zip(stages, wanted, strict=True)
            if key in found
        ],
    }


def spread(ratios: Sequence[float], milliseconds: float) -> dict[str, Any]:
    """Quartiles of a stage's ratios, and its milliseconds if the first stage takes `milliseconds`."""
    lower, median, upper = quartiles(ratios)
    ratio = {"median": median, "lower_quartile": lower, "upper_quartile": upper}
    return {"ratio": ratio, "milliseconds": {"median": median * milliseconds}}


def _forward(model: PreTrainedModel, trainer: Trainer, batch: Mapping[str, Any]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad(), evaluation_mode(model), trainer.accelerator.autocast():
            model(**batch)

    return run
