"""Compare ways to prune a fine-tuned model's heads on a GLUE task's dev set, without training and after it.

    python recipes/compare/pruning_glue.py --model_name_or_path outputs/cola --task_name cola --do_eval \\
        --prune_fractions 0.3 0.5 0.7 --variants random entropy gradient --output_dir outputs/cola-pruned

Scores and refit look at training sentences only. Without --do_eval every pruned model is trained too. Writes
results.json; saves no model. `python recipes/compare/plot_pruning.py` draws the curves of one or several of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_attnkit.experiment.comparing.prunings import PruningComparisonArguments, compare
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import runs


@dataclass
class GluePruningComparisonArguments(PruningComparisonArguments):
    score_samples: int = field(default=512, metadata={"help": "Training sentences to score on."})
    refit_samples: int | None = field(
        default=None, metadata={"help": "Training sentences for the refit; default: as for scores."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("score_samples", "refit_samples")


def main() -> None:
    names = ("score_samples", "refit_samples")
    for arguments, comparison, training in runs(GlueArguments, GluePruningComparisonArguments, saves=False):
        run = GlueRun(arguments, training, comparison)
        compare(run, comparison, {name: min(getattr(comparison, name), len(run.train_data)) for name in names})


if __name__ == "__main__":
    main()
