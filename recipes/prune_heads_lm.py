"""Prune a causal language model's heads and recover it on text: perplexity before and after.

    accelerate launch recipes/prune_heads_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --groups across \\
        --prune_fraction 0.3 --distill --learning_rate 1e-4 --num_train_epochs 1 --per_device_train_batch_size 8 \\
        --output_dir outputs/smollm2-pruned

The text is wikitext-2 unless --dataset_name, --train_file or --text says otherwise. Scores and the refit of the outputs
look at training text. Query heads that share keys and values are removed in whole groups, which makes the cache
smaller, or with `--groups across` equally many of every group, which leaves it as it is and costs less perplexity. The
other flags are those of prune_heads_glue.py: rounds, a target for the time, `--distill`, `--lora`, `--control`. A GGUF
checkpoint is a folder and --gguf_file.

Writes the recovered model, which `hf_attnkit.load_pretrained` loads, results.json (stages "baseline", and of each round
"changed" and "recovered"), the scores and removed heads of each round (head_importance.json) and their heat maps
(head_importance.png) into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.pruning_rounds import PruningArguments
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.prune_and_recover import prune_and_recover
from hf_attnkit.importance import METHODS

REFIT_TOKENS = 8192


@dataclass
class TextPruningArguments(PruningArguments):
    # Entropy tells little of a decoder's heads (docs/results.md).
    importance: str = field(default="gradient", metadata={"help": "Scoring method.", "choices": list(METHODS)})
    score_tokens: int = field(
        default=8192, metadata={"help": "Training tokens to score on, and to time, in whole blocks."}
    )
    refit_tokens: int | None = field(
        default=None,
        metadata={"help": f"Training tokens for the refit, in whole blocks. By default {REFIT_TOKENS:,}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("score_tokens", "refit_tokens", REFIT_TOKENS)


def main() -> None:
    arguments, text, pruning, distillation, lora, training = parse_arguments(
        ModelArguments, TextArguments, TextPruningArguments, DistillationArguments, LoraArguments
    )
    distillation.check(training)
    lora.check(training)
    run = LanguageModelRun(arguments, text, training, pruning, distillation, lora)
    available = run.train_data.tokens.numel()
    asked = {"score_tokens": pruning.score_tokens, "refit_tokens": pruning.refit_tokens}
    sizes = {name: None if size is None else min(size, available) for name, size in asked.items()}
    prune_and_recover(run, pruning, distillation, lora, sizes)


if __name__ == "__main__":
    main()
