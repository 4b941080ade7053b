"""Prune a fine-tuned model's heads and recover it: evaluate, score on training data, prune, evaluate, train, evaluate.

    accelerate launch recipes/prune_heads_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --importance gradient --prune_fraction 0.5 --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-pruned

`--prune_steps 3` prunes and trains in three rounds of equally many heads, each scored again and trained for
`--num_train_epochs`. `--latency_target 0.8` removes heads until a forward pass takes 0.8 of the untouched model's
time. `--refit` fits what is left to the model before, without labels. On grouped heads whole groups are removed, or
with `--groups across` equally many heads of every group. `--distill` trains towards the untouched model, `--lora`
trains adapters and merges them. `--control` also trains the untouched model as long, for comparison.

Writes the recovered model, results.json (stages "baseline", and of each round "changed" and "recovered"), the scores
and removed heads of each round (head_importance.json) and their heat maps (head_importance.png) into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.pruning_rounds import PruningArguments
from hf_attnkit.experiment.sweep import run_each
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.prune_and_recover import prune_and_recover

REFIT_SAMPLES = 2048


@dataclass
class GluePruningArguments(PruningArguments):
    score_samples: int = field(default=512, metadata={"help": "Training sentences to score on, and to time."})
    refit_samples: int | None = field(
        default=None,
        metadata={"help": f"Training sentences for the refit, without labels. By default {REFIT_SAMPLES:,}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("score_samples", "refit_samples", REFIT_SAMPLES)


def main() -> None:
    run_each(prune_on_glue, GlueArguments, GluePruningArguments, DistillationArguments, LoraArguments)


def prune_on_glue(
    arguments: GlueArguments,
    pruning: GluePruningArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    training: TrainingArguments,
) -> None:
    """One run."""
    distillation.check(training)
    lora.check(training)
    run = GlueRun(arguments, training, pruning, distillation, lora)
    sizes = {"score_samples": pruning.score_samples, "refit_samples": pruning.refit_samples}
    prune_and_recover(run, pruning, distillation, lora, sizes)


if __name__ == "__main__":
    main()
