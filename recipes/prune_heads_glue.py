"""Prune a fine-tuned model's heads and recover it: evaluate, score on training data, prune, evaluate, train, evaluate.

    accelerate launch recipes/prune_heads_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --importance gradient --prune_fraction 0.5 --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-pruned

`--prune_steps 3` prunes and trains in three rounds of equally many heads, each scored again and trained for
`--num_train_epochs`. `--latency_target 0.8` removes heads until a forward pass takes 0.8 of the untouched model's
time. `--refit` fits what is left to the model before, without labels. On grouped heads whole groups are removed, or
with `--groups across` equally many heads of every group. `--control` also trains the untouched model as long, for
comparison.

Writes the recovered model, results.json (stages "baseline", and of each round "changed" and "recovered"), the scores
and removed heads of each round (head_importance.json) and their heat maps (head_importance.png) into --output_dir.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import TrainingArguments

from hf_attnkit.experiment.comparing.prunings import rows_of
from hf_attnkit.experiment.files import write_json
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.pruning import prune
from hf_attnkit.experiment.pruning_rounds import Pruner, PruningArguments, number_of_heads, removal, scores_and_heads
from hf_attnkit.experiment.report.heat_map import draw_importance
from hf_attnkit.experiment.sweep import run_each


def main() -> None:
    run_each(prune_and_recover, GlueArguments, PruningArguments)


def prune_and_recover(arguments: GlueArguments, pruning: PruningArguments, training: TrainingArguments) -> None:
    """One run."""
    if pruning.importance == "random":
        pruning.scoring.options.setdefault("seed", training.seed)
    run = GlueRun(arguments, training, pruning)
    batches, refit_batches = (
        list(run.calibration_batches(size)) if size else [] for size in (pruning.score_samples, pruning.refit_samples)
    )
    pruner = Pruner(run.model, pruning, batches)
    run.model.to(training.device)
    run.evaluate("baseline")

    def prune_round(step: int) -> dict[str, Any]:
        scores, gradients = pruning.scoring.scores(run.model, batches)
        removed = pruner.choose(run.model, scores, gradients, step)
        if removed:
            prune(run.model, removed, pruning.refit, refit_batches)
        facts = {"round": step, "scores": rows_of(scores), "removed": removed}
        timed = {"latency": round(pruner.latency(run.model), 3)} if pruning.latency_target is not None else {}
        return facts | timed

    rounds: list[dict[str, Any]] = []
    run.rounds, total = pruning.prune_steps, number_of_heads(run.model)
    for step in range(1, pruning.prune_steps + 1):
        rounds.append(run.change(partial(prune_round, step), kind="pruning", title="heads removed"))
        run.evaluate("changed", **{name: value for name, value in rounds[-1].items() if name != "scores"})
        if training.do_train:
            run.evaluate("recovered", round=step, **run.train())
    run.done = removal(total, total - number_of_heads(run.model), pruning)
    if training.should_save:
        maps = {
            f"round {entry['round']}" if len(rounds) > 1 else "heads removed": scores_and_heads(entry)
            for entry in rounds
        }
        saved = [{name: value for name, value in entry.items() if name != "latency"} for entry in rounds]
        facts = {"importance": pruning.importance, "importance_options": pruning.scoring.options}
        write_json(run.output / "head_importance.json", {**facts, "rounds": saved})
        draw_importance(maps, run.output / "head_importance.png", f"{pruning.importance}, {run.data}")
    run.finish(**pruning.facts())


if __name__ == "__main__":
    main()
