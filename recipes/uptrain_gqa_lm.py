"""Convert a causal language model to grouped-query attention and recover it on text: perplexity before and after.

    accelerate launch recipes/uptrain_gqa_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --num_key_value_heads 1 --distill --learning_rate 1e-4 --num_train_epochs 1 \\
        --per_device_train_batch_size 8 --output_dir outputs/smollm2-mqa

The text is wikitext-2 unless --dataset_name or --train_file says otherwise. `pca` and the refit of queries and
outputs look at training text first (`--calibration_tokens`). `--distill` trains towards the model as it
was, `--lora` trains adapters and merges them. `--control` also trains the untouched model as long, for comparison. A
GGUF checkpoint is a folder and --gguf_file.

Writes the recovered model, a plain GQA checkpoint, and results.json (stages "baseline", "changed",
"recovered") into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.uptrain import ConversionArguments, uptrain


@dataclass
class TextConversionArguments(ConversionArguments):
    calibration_tokens: int = field(
        default=8192, metadata={"help": "Training tokens for pca and the refit, in whole blocks; 0: no data."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_tokens < 0:
            raise ValueError(f"--calibration_tokens {self.calibration_tokens} must be at least 0")


def main() -> None:
    arguments, text, conversion, distillation, lora, training = parse_arguments(
        ModelArguments, TextArguments, TextConversionArguments, DistillationArguments, LoraArguments
    )
    distillation.check(training)
    lora.check(training)
    run = LanguageModelRun(arguments, text, training, conversion, distillation, lora)
    used = run.calibration_size(conversion.calibration_tokens)
    uptrain(run, conversion, distillation, lora, calibration=("calibration_tokens", used))


if __name__ == "__main__":
    main()
