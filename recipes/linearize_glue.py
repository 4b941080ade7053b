"""Linearise the attention of a fine-tuned model: learn features, refit, distil, train; a score after each stage.

    accelerate launch recipes/linearize_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --softmax_layers 2 --learning_rate 3e-5 --num_train_epochs 1 --per_device_train_batch_size 32 --control \\
        --output_dir outputs/cola-linear

Features are learned first, without labels, towards what each layer's softmax attention gives (`--transfer_epochs`).
`--softmax_layers` keeps softmax attention in the layers that cost most. Then output projections are fitted in closed
form, the model is distilled towards the untouched one (`--distill_epochs`), and trained on the task
(`--num_train_epochs`). `--window` keeps near keys exact, and then the report shows what each branch scores alone;
`--window_alone` trains the window without linear attention, for comparison. See docs/linear.md.

Writes the model, which `hf_attnkit.load_pretrained` loads, results.json and report.html into --output_dir.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.linearizing.arguments import (
    LinearizeArguments,
    LinearizeDistillationArguments,
    candidates,
    check,
)
from hf_attnkit.experiment.linearizing.stages import Linearization, longer
from hf_attnkit.experiment.sweep import run_each
from hf_attnkit.experiment.training.lora import LoraArguments


@dataclass
class GlueLinearizeArguments(LinearizeArguments):
    transfer_learning_rate: float = field(default=2e-2, metadata={"help": "Adam's, at the start of these passes."})
    distill_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the training data towards the untouched model; 0 for none."}
    )
    calibration_samples: int = field(
        default=512, metadata={"help": "Training sentences for the layers' costs, the refit and the branches."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.distill_epochs >= 0 and math.isfinite(self.distill_epochs)):
            raise ValueError(f"--distill_epochs {self.distill_epochs} must be at least 0 and finite; 0 leaves it out")
        if self.calibration_samples < 0:
            raise ValueError(f"--calibration_samples {self.calibration_samples} must be at least 0")

    @property
    def reads_training_data(self) -> bool:
        """Whether training sentences are needed without training, too."""
        return self.calibration_samples > 0


def main() -> None:
    run_each(linearize, GlueArguments, GlueLinearizeArguments, LinearizeDistillationArguments, LoraArguments)


def linearize(
    arguments: GlueArguments,
    linearizing: GlueLinearizeArguments,
    distillation: LinearizeDistillationArguments,
    lora: LoraArguments,
    training: TrainingArguments,
) -> None:
    """One run."""
    if not distillation.distill and linearizing.distill_epochs not in (0, GlueLinearizeArguments.distill_epochs):
        raise ValueError(
            f"--distill_epochs {linearizing.distill_epochs} has no effect with --no_distill; leave one out"
        )
    if distillation.distill and not linearizing.distill_epochs and distillation != LinearizeDistillationArguments():
        raise ValueError("the --distill_... options have no effect with --distill_epochs 0; leave them out")
    if not training.do_train and linearizing.distill_epochs:
        linearizing.refuse_given("without training; add --do_train, or leave it out", "distill_epochs")
    epochs = training.num_train_epochs + (linearizing.distill_epochs if distillation.distill else 0)
    check(
        linearizing, distillation, lora, training, calibration="calibration_samples", epochs=epochs,
        longest=("max_length", arguments.max_length),
    )  # fmt: skip
    run = GlueRun(arguments, training, linearizing, distillation, lora)
    used = min(linearizing.calibration_samples, len(run.train_data))
    found = candidates(run.model, linearizing)
    stages = Linearization(run, linearizing, found, ("calibration_samples", used))
    distils = training.do_train and distillation.distill and linearizing.distill_epochs > 0
    if distils:
        stages.keep_teacher()
    run.model.to(training.device)
    run.evaluate("baseline")
    more, trainings = linearizing.distill_epochs if distils else 0, distils + (training.num_train_epochs > 0)
    run.control(lambda: run.train(args=longer(training, more, trainings=trainings)))
    stages.swap()
    stages.transfer()
    stages.choose()
    stages.refit()
    if distils:
        stages.distil(distillation, lora, epochs=linearizing.distill_epochs)
    if training.do_train and training.num_train_epochs:
        stages.train(lora)
    stages.finish(distill_epochs=linearizing.distill_epochs if distils else 0)


if __name__ == "__main__":
    main()
