"""Publish a run: save the model, predict, write results.json, the model card and the report."""

from __future__ import annotations

import atexit
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hf_attnkit.analysis.entropy_callback import core_model
from hf_attnkit.experiment.costs import machine
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.record import command, command_digest
from hf_attnkit.experiment.report.attention_page import write_attention_page
from hf_attnkit.experiment.report.card import write_card
from hf_attnkit.experiment.report.console import print_stages
from hf_attnkit.experiment.report.page import write_report
from hf_attnkit.experiment.report.stage_table import label, model_name
from hf_attnkit.experiment.resume import writing
from hf_attnkit.experiment.timing import longest_batch, time_stages
from hf_attnkit.export.loads_where import loads_where

if TYPE_CHECKING:
    from hf_attnkit.experiment.run import Run

PACKAGES = ("hf_attnkit", "transformers", "torch", "accelerate")


def versions() -> dict[str, str]:
    """The versions that the numbers were measured with."""
    return {name: version(name) for name in PACKAGES}


def results(run: Run, **facts: Any) -> dict[str, Any]:
    """What results.json holds: what was done to which model on which data, the stages, and how to repeat it.

    Args:
        facts: the recipe's own settings.
    """
    argv = getattr(run.arguments, "command", None) or sys.argv
    names = [stage["stage"] for stage in run.stages]
    return {
        "task": run.task_name,
        "model": run.started_from,
        "data": run.data.record(),
        "change": vars(run.done) if run.done is not None else None,
        "actions": {
            "trained": run.has_trained,
            "measured": bool(run.stages),
            "predicted": bool(facts.get("predictions")),
        },
        "stages": run.stages,
        "timing": None,
        "control": names.index("control") if "control" in names else None,
        **facts,
        "train_samples": len(run.train_data),
        "seed": run.training.seed,
        "device": machine(run.training),
        "command": command(argv),
        "command_digest": command_digest(argv),
        "versions": versions(),
    }


def publish(run: Run, **facts: Any) -> None:
    """Save model and tokenizer, predict, time the stages, and write the model card; results.json comes last and marks
    a finished run. The report comes after it, since it can be made again from the folder."""
    trainer = run.trainer()
    with writing(run.output):
        trainer.save_model(str(run.output), _internal_call=True)  # a push comes last, when all is there
    found = results(run, **facts, **run.predict(trainer))
    batch = longest_batch(trainer, run.eval_data) if run.stages else {}
    if trainer.is_world_process_zero():
        if run.stages:
            where = found["device"]
            found["timing"] = time_stages(run.stages, run.models(), trainer, batch, device=where, label=label)
        inside = None if run.sharded else core_model(run.model)
        found["loads"] = [vars(answer) for answer in loads_where(run.output, inside, run.tokenizer)]
        write_card(run.output, found, name=run.training.hub_model_id or model_name(str(run.output.resolve())))
        write_json(run.output / "results.json", found)
        run.progress.remove()
        if not run.training.push_to_hub:  # it holds sentences of the data, which may not be the public's
            write_attention_page(run)
        write_report(run.output)
        print_stages(found)
    if run.training.push_to_hub:
        trainer.create_model_card = lambda **_: None  # it would write its own over ours
        trainer.push_to_hub()
    # Not now: the processes may have more runs before them.
    atexit.register(PartialState().destroy_process_group)
