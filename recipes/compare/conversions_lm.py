"""Compare ways to convert a causal language model to grouped-query attention, without training, by perplexity.

    python recipes/compare/conversions_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --num_key_value_heads 1 --output_dir outputs/smollm2-compared

Calibration looks at training text only. Writes results.json; saves no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.comparing.conversions import ComparisonArguments, compare
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments


@dataclass
class TextComparisonArguments(ComparisonArguments):
    calibration_tokens: int = field(default=8192, metadata={"help": "Training tokens to calibrate on."})


def main() -> None:
    arguments, text, comparison, training = parse_arguments(
        ModelArguments, TextArguments, TextComparisonArguments, trains=False
    )
    run = LanguageModelRun(arguments, text, training, comparison)
    tokens = run.calibration_size(comparison.calibration_tokens)
    compare(run, comparison, ("calibration_tokens", tokens))


if __name__ == "__main__":
    main()
