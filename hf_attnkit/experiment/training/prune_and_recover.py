"""Prune in rounds and recover: what the pruning recipes do with their `Run`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from hf_attnkit.experiment.comparing.prunings import rows_of
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.pruning import prune
from hf_attnkit.experiment.pruning_rounds import Pruner, PruningArguments, number_of_heads, removal, scores_and_heads
from hf_attnkit.experiment.report.heat_map import draw_importance
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.uptrain import recover


def prune_and_recover(
    run: Run,
    pruning: PruningArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    sizes: Mapping[str, int | None],
) -> None:
    """Evaluate; then in each round score, prune, evaluate, train and evaluate; save.

    The teacher of every round is the untouched model.

    Args:
        sizes: how much data scores and refit look at, in this order, by the names that results.json gives these.
    """
    if pruning.importance == "random":
        pruning.scoring.options.setdefault("seed", run.training.seed)
    batches, refit_batches = (list(run.calibration_batches(size)) if size else [] for size in sizes.values())
    pruner = Pruner(run.model, pruning, batches)
    # Before anything prepares the model: under autocast accelerate gives it a forward that a copy would share.
    teacher = copy.deepcopy(run.model) if distillation.distill else None
    run.model.to(run.training.device)
    run.evaluate("baseline")
    run.rounds, total = pruning.prune_steps, number_of_heads(run.model)
    run.control(lambda: recover(run, None, distillation, lora))

    def prune_round(step: int) -> dict[str, Any]:
        scores, gradients = pruning.scoring.scores(run.model, batches)
        removed = pruner.choose(run.model, scores, gradients, step)
        if removed:
            prune(run.model, removed, pruning.refit, refit_batches)
        facts = {"round": step, "scores": rows_of(scores), "removed": removed}
        timed = {"latency": round(pruner.latency(run.model), 3)} if pruning.latency_target is not None else {}
        return facts | timed

    rounds: list[dict[str, Any]] = []
    for step in range(1, pruning.prune_steps + 1):
        rounds.append(run.change(partial(prune_round, step), kind="pruning", title="heads removed"))
        run.evaluate("changed", **{name: value for name, value in rounds[-1].items() if name != "scores"})
        if run.training.do_train:
            run.evaluate("recovered", round=step, **recover(run, teacher, distillation, lora))
    run.done = removal(total, total - number_of_heads(run.model), pruning)
    if run.training.should_save:
        _write_scores(run, pruning, rounds)
    facts: dict[str, Any] = {**pruning.facts(), **sizes}
    for asked, flags in ((distillation.distill, distillation), (lora.lora, lora)):
        facts |= vars(flags) if asked else {}
    run.finish(**facts)


def _write_scores(run: Run, pruning: PruningArguments, rounds: list[dict[str, Any]]) -> None:
    """The scores and the removed heads of each round, as JSON and as heat maps."""
    maps = {
        f"round {entry['round']}" if len(rounds) > 1 else "heads removed": scores_and_heads(entry) for entry in rounds
    }
    saved = [{name: value for name, value in entry.items() if name != "latency"} for entry in rounds]
    facts = {"importance": pruning.importance, "importance_options": pruning.scoring.options}
    write_json(run.output / "head_importance.json", {**facts, "rounds": saved})
    draw_importance(maps, run.output / "head_importance.png", f"{pruning.importance}, {run.data}")
