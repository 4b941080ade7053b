"""Compare ways to prune a fine-tuned model's heads on a GLUE task's dev set, without training and after it.

    python recipes/compare/pruning_glue.py --model_name_or_path outputs/cola --task_name cola --do_eval \\
        --prune_fractions 0.3 0.5 0.7 --variants random entropy gradient --output_dir outputs/cola-pruned

Scores and refit look at training sentences only. Without --do_eval every pruned model is trained too. Writes
results.json; saves no model. `python recipes/compare/plot_pruning.py` draws the curves of one or several of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_attnkit.experiment.comparing.distance import HELP, Distance
from hf_attnkit.experiment.comparing.prunings import PruningComparisonArguments, compare
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import run_each


@dataclass
class GluePruningComparisonArguments(PruningComparisonArguments):
    score_samples: int = field(default=512, metadata={"help": "Training sentences to score on."})
    refit_samples: int | None = field(
        default=None, metadata={"help": "Training sentences for the refit. By default as many as for the scores."}
    )
    distance_samples: int = field(default=0, metadata={"help": HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("score_samples", "refit_samples")


def main() -> None:
    run_each(compare_prunings, GlueArguments, GluePruningComparisonArguments, saves=False)


def compare_prunings(
    arguments: GlueArguments, comparison: GluePruningComparisonArguments, training: TrainingArguments
) -> None:
    """One run."""
    run = GlueRun(arguments, training, comparison)
    names = ("score_samples", "refit_samples")
    sizes = {name: min(getattr(comparison, name), len(run.train_data)) for name in names}
    distance = Distance(run, comparison.distance_samples, max(sizes.values()))
    compare(run, comparison, sizes, distance)


if __name__ == "__main__":
    main()
