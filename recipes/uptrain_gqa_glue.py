"""Convert a fine-tuned model to grouped-query attention and recover it: evaluate, convert, evaluate, train, evaluate.

    accelerate launch recipes/uptrain_gqa_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --num_key_value_heads 3 --method pca --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-gqa

`pca` and the refit of queries and outputs look at training sentences first (`--calibration_samples`);
neither uses labels. `--method mean --refit none` is mean-pooling as published, the baseline. `--distill`
trains towards the model as it was, `--lora` trains adapters and merges them. `--control` also trains the untouched
model as long, for comparison.

Writes the recovered model and results.json (stages "baseline", "changed", "recovered") into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import run_each
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.uptrain import ConversionArguments, uptrain


@dataclass
class GlueConversionArguments(ConversionArguments):
    calibration_samples: int = field(
        default=512, metadata={"help": "Training sentences for pca and the refit; 0: no data."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_samples < 0:
            raise ValueError(f"--calibration_samples {self.calibration_samples} must be at least 0")

    @property
    def reads_training_data(self) -> bool:
        """Whether training sentences are needed without training, too."""
        return self.calibration_samples > 0


def main() -> None:
    run_each(convert_and_recover, GlueArguments, GlueConversionArguments, DistillationArguments, LoraArguments)


def convert_and_recover(
    arguments: GlueArguments,
    conversion: GlueConversionArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    training: TrainingArguments,
) -> None:
    """One run."""
    distillation.check(training)
    lora.check(training)
    run = GlueRun(arguments, training, conversion, distillation, lora)
    used = min(conversion.calibration_samples, len(run.train_data))
    uptrain(run, conversion, distillation, lora, calibration=("calibration_samples", used))


if __name__ == "__main__":
    main()
