"""Compare what a causal language model predicts when it reads a long text through its cache, and what the cache holds.

    python recipes/compare/streamed_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --block_size 1024 \\
        --max_eval_samples 8 --variants untouched flash:cache_dtype=int8 streaming_heads:share=0.5,window=256 \\
        --output_dir outputs/smollm2-cached

The held-out blocks make one text, which is read `--chunk_size` tokens at a time. A variant is `untouched`, a kind of
attention with its options, heads that stream as a share of all (those with the least reach in the outputs on training
text), or `fresh`: the untouched model without a cache, which reads again the `--fresh_tokens` before each piece of as
many, and only the last `--last_tokens` of the text. That is what to compare with where a text is longer than any that
the model was trained on:

    python recipes/compare/streamed_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --block_size 1024 \\
        --max_eval_samples 100 --chunk_size 256 --last_tokens 10000 \\
        --variants fresh sliding_window:window=1024,num_sink_tokens=4,renumber=true --output_dir outputs/smollm2-endless

Writes results.json and reading.png; saves no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers import Trainer

import hf_attnkit
from hf_attnkit.common.progress import progress_bar
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.comparing.reading import draw
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.kinds import GivenKind, parse_kind
from hf_attnkit.experiment.record import Change
from hf_attnkit.experiment.text import through_cache
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments

UNTOUCHED, FRESH = "untouched", "fresh"


@dataclass
class ReadingArguments:
    variants: list[str] = field(
        default_factory=lambda: [UNTOUCHED, "flash:cache_dtype=int8", "streaming_heads:share=0.5,window=256"],
        metadata={
            "help": f"{UNTOUCHED}, {FRESH}, or a kind of attention with its options (flash:cache_dtype=int8); of heads "
            "that stream their share (streaming_heads:share=0.5,window=256)."
        },
    )
    chunk_size: int = field(default=512, metadata={"help": "Tokens that are read at once."})
    last_tokens: int | None = field(
        default=None,
        metadata={"help": "The end of the text that is also measured by itself, up to a chunk more; by default all."},
    )
    fresh_tokens: int = field(default=1024, metadata={"help": f"Tokens that {FRESH} reads again, and reads on from."})
    score_tokens: int = field(default=3072, metadata={"help": "Training tokens to choose heads that stream on."})

    def __post_init__(self) -> None:
        for name in ("chunk_size", "last_tokens", "fresh_tokens", "score_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if len(set(self.variants)) < len(self.variants):
            raise ValueError(f"--variants {self.variants} names one more than once")
        self.kinds: dict[str, GivenKind] = {
            word: parse_kind(word, "--variants") for word in self.variants if word not in (UNTOUCHED, FRESH)
        }


class ReadingRun(LanguageModelRun):
    """Measured by reading the held-out blocks as one text.

    Attributes:
        variant: what the model is now.
    """

    variant: str

    def __init__(self, arguments: ModelArguments, text: TextArguments, training: Any, reading: ReadingArguments):
        super().__init__(arguments, text, training, reading)
        self.reading, self.text = reading, self.eval_data.tokens.flatten().long()
        last = len(self.text) if reading.last_tokens is None else reading.last_tokens
        if last > len(self.text):
            raise ValueError(f"--last_tokens {last} is more than the text's {len(self.text)} tokens")
        self.end = (len(self.text) - last) // reading.chunk_size * reading.chunk_size

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        fresh = self.variant == FRESH
        total = len(self.text) - (self.end if fresh else 0)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        with progress_bar(description=self.variant, unit="token", total=total) as bar:
            try:
                if fresh:
                    context = self.reading.fresh_tokens
                    points = through_cache.read_fresh(self.model, self.text, self.end, context, bar.update)
                else:
                    points = through_cache.read(self.model, self.text, self.reading.chunk_size, bar.update)
            except IndexError as error:  # learned positions; others go on
                if positions is None or len(self.text) <= positions:
                    raise
                raise ValueError(
                    f"the text's {len(self.text)} tokens are more than the model's {positions} positions; lower "
                    f"--max_eval_samples to {positions // self.block_size}"
                ) from error
        metrics = {"last_perplexity": through_cache.perplexity(points, self.end)}
        if not fresh:
            metrics = {"perplexity": through_cache.perplexity(points)} | metrics
        return {"metrics": metrics, "variant": self.variant, "points": [asdict(point) for point in points]}


def main() -> None:
    arguments, text, reading, training = parse_arguments(ModelArguments, TextArguments, ReadingArguments, trains=False)
    run = ReadingRun(arguments, text, training, reading)
    wanted = chosen(run, reading)
    untouched, *_ = run.models()
    del run.model  # one model at a time, so that what the process holds compares
    for word in reading.variants:
        run.model, run.variant = untouched().to(training.device), word
        if word in wanted:
            hf_attnkit.swap_attention(run.model, wanted[word])
        run.evaluate("changed" if word in reading.kinds else "baseline")
        print(f"{word}: {run.stages[-1]['metrics']}", flush=True)
        del run.model
    run.model = untouched()
    run.done = Change("comparison", "texts read through a cache compared", {"variants": reading.variants})
    results = run.results(
        variants=reading.variants, chunk_size=reading.chunk_size, tokens=len(run.text),
        last_tokens=len(run.text) - run.end, fresh_tokens=reading.fresh_tokens, score_tokens=reading.score_tokens,
    )  # fmt: skip
    if training.should_save:
        write_json(run.output / "results.json", results)
        run.progress.remove()
        title = f"{run.data.name}: {len(run.text):,} tokens in chunks of {reading.chunk_size}"
        draw(results["stages"], title, run.output / "reading.png")
        print_readings(results, title)


def chosen(run: ReadingRun, reading: ReadingArguments) -> dict[str, Any]:
    """What `swap_attention` takes for each variant that is swapped."""
    model = run.model.to(run.training.device)
    for given in reading.kinds.values():
        given.check(model)

    def reach(**window: Any) -> Tensor:
        batches = run.calibration_batches(reading.score_tokens)
        return hf_attnkit.head_importance(model, batches, method="reach", measure="outputs", **window)

    return {word: given.specification(model, reach) for word, given in reading.kinds.items()}


def print_readings(results: Mapping[str, Any], title: str) -> None:
    """One row per variant. Ratios are to the first; of memory the least and the most in the second half of the text."""
    table = Table(title=title)
    table.add_column("variant", overflow="fold")
    for heading in (
        "perplexity",
        f"of the last {results['last_tokens']:,}",
        "ratio",
        "cache, MiB",
        "most",
        "memory, MiB",
    ):
        table.add_column(heading, justify="right")
    first = results["stages"][0]["metrics"]["last_perplexity"]
    for stage in results["stages"]:
        metrics, points = stage["metrics"], stage["points"]
        caches = [point["cache_bytes"] / 2**20 for point in points]
        memory = [point["memory_bytes"] for point in points[len(points) // 2 :] if point["memory_bytes"] is not None]
        table.add_row(
            stage["variant"], f"{metrics['perplexity']:.4g}" if "perplexity" in metrics else "",
            f"{metrics['last_perplexity']:.4g}", f"{metrics['last_perplexity'] / first:.3f}",
            f"{caches[-1]:.1f}", f"{max(caches):.1f}",
            f"{min(memory) / 2**20:,.0f} to {max(memory) / 2**20:,.0f}" if memory else "",
        )  # fmt: skip
    show(table)


if __name__ == "__main__":
    main()
