"""Compare ways to prune a causal language model's heads by perplexity, without training and after it.

    python recipes/compare_pruning_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --do_eval \\
        --groups across --prune_fractions 0.1 0.3 0.5 --variants random entropy gradient \\
        --output_dir outputs/smollm2-pruned

Scores and refit look at training text only. Without --do_eval every pruned model is trained too. Writes results.json;
saves no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from base_run import parse_arguments
from compare_pruning import PruningComparisonArguments, compare
from lm_data import TextArguments
from lm_run import LanguageModelRun, ModelArguments


@dataclass
class TextPruningComparisonArguments(PruningComparisonArguments):
    score_tokens: int = field(default=8192, metadata={"help": "Training tokens for scores and refit."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_tokens < 1:
            raise ValueError(f"--score_tokens {self.score_tokens} must be at least 1")


def main() -> None:
    arguments, text, comparison, training = parse_arguments(
        ModelArguments, TextArguments, TextPruningComparisonArguments
    )
    run = LanguageModelRun(arguments, text, training)
    compare(run, comparison, ("score_tokens", min(comparison.score_tokens, run.train_data.tokens.numel())))


if __name__ == "__main__":
    main()
