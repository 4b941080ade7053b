"""Compare which heads of a causal language model may see only the first tokens and a window.

By perplexity, and by whether something random that was hidden in a long text is found again:

    python recipes/compare/long_context_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --block_size 3072 --windows 256 --shares 0.25 0.5 0.67 0.8 --find passkey --find_lengths 1024 \\
        --output_dir outputs/smollm2-streaming

Of the key/value heads a share streams: those with the least reach, in the residual stream or in the outputs, or random
ones. Next to them a window for all heads whose cache is as large. Scores and refit look at training text only. Writes
results.json; saves no model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

import hf_attnkit
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.record import Change
from hf_attnkit.experiment.text import hidden
from hf_attnkit.experiment.text.data import TextArguments
from hf_attnkit.experiment.text.run import LanguageModelRun, ModelArguments
from hf_attnkit.models.layers import attention_layers

OUTPUTS = "reach:measure=outputs"
VARIANTS = ("reach", "reach+refit", OUTPUTS, f"{OUTPUTS}+refit", "random", "random+refit", "window")


@dataclass
class StreamingArguments:
    windows: list[int] = field(default_factory=lambda: [256], metadata={"help": "Keys that a streaming head sees."})
    shares: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.67, 0.8, 1.0],
        metadata={"help": "Shares of the key/value heads that stream, above 0; 1: all."},
    )
    num_sink_tokens: int = field(default=4, metadata={"help": "First tokens that they see as well."})
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS),
        metadata={
            "help": f"Any of {', '.join(VARIANTS)}: what the heads that stream have the least of; window: of all "
            "heads, with a cache as large."
        },
    )
    random_draws: int = field(default=3, metadata={"help": "How often random heads are drawn."})
    score_tokens: int = field(default=3072, metadata={"help": "Training tokens to score on."})
    refit_tokens: int = field(default=12288, metadata={"help": "Training tokens for the refit."})
    find: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Any of {', '.join(hidden.FORMS)}: hidden in held-out text and looked for; none by default."
        },
    )
    find_lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096],
        metadata={"help": "Tokens of the texts that hide them."},
    )
    find_draws: int = field(default=1, metadata={"help": f"Strings for each length and each depth of {hidden.DEPTHS}."})

    def __post_init__(self) -> None:
        for form in self.find:
            if form not in hidden.FORMS:
                raise ValueError(f"--find {form!r} must be one of {', '.join(hidden.FORMS)}")
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"--variants {variant!r} must be one of {', '.join(VARIANTS)}")
        for share in self.shares:
            if not 0 < share <= 1:
                raise ValueError(f"--shares {share} must be above 0 and at most 1")
        for name in ("random_draws", "score_tokens", "refit_tokens", "find_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")


def main() -> None:
    arguments, text, streaming, training = parse_arguments(
        ModelArguments, TextArguments, StreamingArguments, trains=False
    )
    run = LanguageModelRun(arguments, text, training, streaming)
    original = run.model.to(training.device)
    measure(run, streaming, "baseline", cache_share=1.0)
    for window in streaming.windows:
        compare(run, original, streaming, window)
    run.model = original
    run.done = Change("comparison", "heads that stream compared", {"variants": streaming.variants})
    results = run.results(
        windows=streaming.windows, shares=streaming.shares, variants=streaming.variants,
        num_sink_tokens=streaming.num_sink_tokens, score_tokens=streaming.score_tokens,
        refit_tokens=streaming.refit_tokens, find=streaming.find, find_lengths=streaming.find_lengths,
        find_draws=streaming.find_draws,
    )  # fmt: skip
    if training.should_save:
        write_json(run.output / "results.json", results)
        run.progress.remove()
        print_comparison(results, str(run.data))
        print_found(results)


def measure(run: LanguageModelRun, arguments: StreamingArguments, stage: str, **facts: Any) -> None:
    """Perplexity, and what is found."""
    text = run.eval_data.tokens.flatten().long()
    options = (arguments.find_lengths, arguments.find_draws)
    if arguments.find:
        facts["found"] = {
            form: hidden.shares_found(run.model, run.tokenizer, text, form, *options) for form in arguments.find
        }
    run.evaluate(stage, **facts)


def compare(run: LanguageModelRun, original: Any, arguments: StreamingArguments, window: int) -> None:
    options: dict[str, Any] = {"window": window, "num_sink_tokens": arguments.num_sink_tokens}
    draws = range(arguments.random_draws)
    scores = {}
    for name in dict.fromkeys(variant.partition("+")[0] for variant in arguments.variants):
        if name.startswith("reach"):
            batches = run.calibration_batches(arguments.score_tokens)
            measured = {"measure": "outputs"} if name == OUTPUTS else {}
            scores[name] = [hf_attnkit.head_importance(original, batches, method="reach", **options, **measured)]
    scores["random"] = [hf_attnkit.head_importance(original, method="random", seed=seed) for seed in draws]
    for share in arguments.shares:
        for variant in arguments.variants:
            method, _, refit = variant.partition("+")
            if method == "window":
                measure_window(run, original, arguments, window, share)
                continue
            for draw, score in enumerate(scores[method] if share < 1 else scores[method][:1]):
                if share == 1 and any(
                    other.partition("+")[2] == refit and other != "window"
                    for other in arguments.variants[: arguments.variants.index(variant)]
                ):
                    continue  # all heads, whatever the score
                kinds = hf_attnkit.streaming_kinds(chosen(original, score, share), original, **options)
                run.model = copy.deepcopy(original)
                more: dict[str, Any] = {}
                if refit:
                    more["calibration"] = list(run.calibration_batches(arguments.refit_tokens))
                hf_attnkit.swap_attention(run.model, kinds, **more)
                size = cache_share(original, kinds, run.block_size)
                facts = {"variant": variant, "window": window, "share": share, "draw": draw, "cache_share": size}
                measure(run, arguments, "changed", **facts)
                print(f"window {window}, {share:.0%} of heads, {variant}: {reached(run)}", flush=True)


def measure_window(
    run: LanguageModelRun, original: Any, arguments: StreamingArguments, window: int, share: float
) -> None:
    """A window and sinks for all heads, with as many tokens in the cache as streaming heads would leave."""
    sinks = arguments.num_sink_tokens
    size = (1 - share) + share * min(1.0, (sinks + window - 1) / run.block_size)
    wide = max(round(size * run.block_size) - sinks + 1, 1)
    run.model = hf_attnkit.swap_attention(copy.deepcopy(original), "sliding_window", window=wide, num_sink_tokens=sinks)
    measure(run, arguments, "changed", variant="window", window=window, share=share, draw=0, cache_share=size)
    print(f"window {wide} of all heads, for {share:.0%}: {reached(run)}", flush=True)


def reached(run: LanguageModelRun) -> dict[str, Any]:
    """What the last stage measured."""
    return {name: run.stages[-1][name] for name in ("metrics", "found") if name in run.stages[-1]}


def chosen(model: Any, scores: torch.Tensor, share: float) -> dict[int, list[int]]:
    if share == 1:
        return {layer.index: list(range(layer.num_heads)) for layer in attention_layers(model)}
    return hf_attnkit.select_heads(scores, fraction=share, min_heads=0, model=model)


def cache_share(model: Any, kinds: Mapping[int | str, tuple[str, Mapping[str, Any]]], length: int) -> float:
    """Tokens times heads that the cache keeps after so many tokens, of all."""
    kept = whole = 0
    for layer in attention_layers(model):
        name, options = kinds[layer.index]
        number = layer.num_key_value_heads
        streaming = {"flash": 0, "sliding_window": number}.get(name, len(options.get("heads", ())))
        near = min(options.get("num_sink_tokens", 0) + options.get("window", length + 1) - 1, length)
        kept += streaming * near + (number - streaming) * length
        whole += number * length
    return kept / whole


def print_comparison(results: Mapping[str, Any], data: str) -> None:
    """One row per window and share, one column per variant: perplexity over the untouched model's, mean over draws."""
    baseline, *others = results["stages"]
    before = baseline["metrics"]["perplexity"]
    table = Table(title=f"perplexity ({data}) as a multiple of the untouched model's {before:.4g}")
    for heading in ("window", "streaming", "cache", *results["variants"]):
        table.add_column(heading, justify="right")
    for window in results["windows"]:
        for share in results["shares"]:
            rows = [each for each in others if (each["window"], each["share"]) == (window, share)]
            cells = []
            for variant in results["variants"]:
                found = [each["metrics"]["perplexity"] / before for each in rows if each["variant"] == variant]
                spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
                cells.append(f"{sum(found) / len(found):.3f}{spread}" if found else "")
            table.add_row(str(window), f"{share:.0%}", f"{rows[0]['cache_share']:.2f}", *cells)
    show(table)


def print_found(results: Mapping[str, Any]) -> None:
    """One row per stage and form, one column per length: the share found, of random heads the mean over draws."""
    rows: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for stage in results["stages"]:
        share = "" if stage["stage"] == "baseline" else f"{stage['share']:.0%}"
        for form, found in stage.get("found", {}).items():
            what = (form, str(stage.get("window", "")), share, stage.get("variant", "untouched"))
            rows.setdefault(what, []).append(found)
    if not rows:
        return
    table = Table(title=f"share found at {len(hidden.DEPTHS)} depths, by tokens of the text")
    for heading in ("hidden", "window", "streaming", "variant", *map(str, results["find_lengths"])):
        table.add_column(heading, justify="right")
    for row, draws in rows.items():
        table.add_row(*row, *(f"{sum(each[length] for each in draws) / len(draws):.2f}" for length in draws[0]))
    show(table)


if __name__ == "__main__":
    main()
