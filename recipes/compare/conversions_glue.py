"""Compare ways to convert a fine-tuned model to grouped-query attention, without training, on a GLUE task's dev set.

    python recipes/compare/conversions_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --num_key_value_heads 6 4 3 2 1 --output_dir outputs/cola-compared

Calibration looks at training sentences only. Writes results.json; saves no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_attnkit.experiment.comparing.conversions import ComparisonArguments, compare
from hf_attnkit.experiment.comparing.distance import HELP, Distance
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import run_each


@dataclass
class GlueComparisonArguments(ComparisonArguments):
    calibration_samples: int = field(default=512, metadata={"help": "Training sentences to calibrate on."})
    distance_samples: int = field(default=0, metadata={"help": HELP})


def main() -> None:
    run_each(compare_conversions, GlueArguments, GlueComparisonArguments, trains=False, saves=False)


def compare_conversions(
    arguments: GlueArguments, comparison: GlueComparisonArguments, training: TrainingArguments
) -> None:
    """One run."""
    run = GlueRun(arguments, training, comparison)
    size = min(comparison.calibration_samples, len(run.train_data))
    distance = Distance(run, comparison.distance_samples, size)
    compare(run, comparison, ("calibration_samples", size), distance)


if __name__ == "__main__":
    main()
