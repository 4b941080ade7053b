"""Linearise the attention of a causal language model: learn features, refit, distil; perplexity after each stage.

    accelerate launch recipes/linearize_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --window 64 --gate \\
        --softmax_layers 15 --learning_rate 1e-4 --num_train_epochs 1 --per_device_train_batch_size 8 \\
        --output_dir outputs/smollm2-linear

Features are learned first, towards what each layer's softmax attention gives (`--transfer_epochs`). `--softmax_layers`
keeps softmax attention in the layers that cost most. Then output projections are fitted in closed form, and the model
is distilled towards the untouched one (`--num_train_epochs`); `--no_distill` trains on the text alone, `--lora` trains
adapters and merges them. `--window` keeps near keys exact, and then the report shows the perplexity of each branch
alone; `--window_alone` trains the window without linear attention, for comparison. See docs/linear.md.

Writes the model, which `hf_attnkit.load_pretrained` loads, results.json and report.html into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.linearizing.arguments import (
    LinearizeArguments,
    LinearizeDistillationArguments,
    candidates,
    check,
)
from hf_attnkit.experiment.linearizing.stages import Linearization
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments
from hf_attnkit.experiment.training.lora import LoraArguments


@dataclass
class TextLinearizeArguments(LinearizeArguments):
    # Its state is as large as 65 tokens of keys and values, those of degree two as 1,106 and 1,138.
    feature_map: str = field(
        default="hedgehog_weighted",
        metadata={"help": "What replaces the exponential.", "choices": list(FEATURE_MAPS)},
    )
    calibration_tokens: int = field(
        default=8192, metadata={"help": "Training tokens for the layers' costs, the refit and the branches."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_tokens < 0:
            raise ValueError(f"--calibration_tokens {self.calibration_tokens} must be at least 0")


def main() -> None:
    arguments, text, linearizing, distillation, lora, training = parse_arguments(
        ModelArguments, TextArguments, TextLinearizeArguments, LinearizeDistillationArguments, LoraArguments
    )
    epochs = training.num_train_epochs
    check(
        linearizing, distillation, lora, training, calibration="calibration_tokens", epochs=epochs,
        longest=("block_size", text.block_size),
    )  # fmt: skip
    run = LanguageModelRun(arguments, text, training, linearizing, distillation, lora)
    used = run.calibration_size(linearizing.calibration_tokens)
    found = candidates(run.model, linearizing)
    stages = Linearization(run, linearizing, found, ("calibration_tokens", used))
    if training.do_train and distillation.distill:
        stages.keep_teacher()
    run.model.to(training.device)
    run.evaluate("baseline")
    run.control()
    stages.swap()
    stages.transfer()
    stages.choose()
    stages.refit()
    if training.do_train and training.num_train_epochs:
        stages.distil(distillation, lora, epochs=training.num_train_epochs, stage="recovered")
    stages.finish()


if __name__ == "__main__":
    main()
