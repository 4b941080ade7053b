"""Compare ways to prune a causal language model's heads by perplexity, without training and after it.

    python recipes/compare/pruning_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --do_eval \\
        --groups across --prune_fractions 0.1 0.3 0.5 --variants random entropy gradient \\
        --output_dir outputs/smollm2-pruned

Scores and refit look at training text only. Without --do_eval every pruned model is trained too. Writes results.json;
saves no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_attnkit.experiment.comparing.prunings import PruningComparisonArguments, compare
from hf_attnkit.experiment.run import parse_arguments
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments


@dataclass
class TextPruningComparisonArguments(PruningComparisonArguments):
    score_tokens: int = field(default=8192, metadata={"help": "Training tokens to score on."})
    refit_tokens: int | None = field(
        default=None, metadata={"help": "Training tokens for the refit; default: as for scores."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("score_tokens", "refit_tokens")


def main() -> None:
    arguments, text, comparison, training = parse_arguments(
        ModelArguments, TextArguments, TextPruningComparisonArguments, saves=False
    )
    run = LanguageModelRun(arguments, text, training, comparison)
    names, available = ("score_tokens", "refit_tokens"), run.train_data.tokens.numel()
    compare(run, comparison, {name: min(getattr(comparison, name), available) for name in names})


if __name__ == "__main__":
    main()
