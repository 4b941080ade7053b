"""Decode speed, time to the first token and cache size of a language model as it is and changed, timed alternately.

Converted to fewer key/value heads:

    python recipes/benchmarks/decode.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --num_key_value_heads 1 \\
        --lengths 1024 2048 4096 8192 --repeats 9

With other kinds of attention; which heads stream is drawn at random, since that does not change the time:

    python recipes/benchmarks/decode.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --lengths 8192 \\
        --kinds streaming_heads:share=0.5,window=256 flash:cache_dtype=int8 linear --first_token_repeats 3

A sample is one decode step of the whole model, batch size 1, behind a cache that already holds a prompt of so many
random tokens. Where the cache can be cropped it is cut back after each step; elsewhere it grows by a token. Reported:
median tokens per second and quartiles, the ratio of medians to the untouched model, and the bytes that the cache holds.
With `--first_token_repeats` also the seconds that a pass over the prompt takes, to the logits of its last token. Stock
attention is SDPA; a conversion is measured twice, `+ gqa` swaps in this package's grouped attention, which never
repeats keys and values.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

import hf_attnkit
from hf_attnkit.experiment.benchmarking.measure import quartiles, time_alternately
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.kinds import GivenKind, parse_kind
from hf_attnkit.experiment.text.run import load_causal_model
from hf_attnkit.models.cache_size import held_bytes
from hf_attnkit.models.layers import attention_layers


def prompt(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, Callable[[], object]]:
    """A cache, empty as yet, and a pass over token ids `(1, T)` that fills it; a later call starts again."""
    cache = DynamicCache(config=model.config)
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def run() -> None:
        cache.layers = DynamicCache(config=model.config).layers
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, **options)

    return cache, run


def decode_step(model: PreTrainedModel, cache: DynamicCache) -> Callable[[], object]:
    """One token through the model behind the cached ones; a cache that can be cut back is, so that steps are alike."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    crops = all(getattr(layer, "is_croppable", True) and not layer.is_sliding for layer in cache.layers)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        if crops:
            cache.crop(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub name of a causal model")
    parser.add_argument("--gguf_file", help="a GGUF file in it, which is dequantized")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--num_key_value_heads", type=int, nargs="+", default=[], help="numbers to convert to")
    parser.add_argument(
        "--kinds", nargs="+", default=[],
        help="kinds of attention with their options, such as flash:cache_dtype=int8; of heads that stream their share, "
        "streaming_heads:share=0.5,window=256",
    )  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="cached tokens")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each model and length")
    parser.add_argument(
        "--first_token_repeats", type=int, default=0, help="samples of the time to the first token; 0 for none"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, help="JSON of all measurements")
    arguments = parser.parse_args()
    if min(*arguments.lengths, arguments.repeats) < 1:
        parser.error("--lengths and --repeats must be at least 1")
    if arguments.first_token_repeats < 0:
        parser.error(f"--first_token_repeats {arguments.first_token_repeats} must be at least 0")
    if not (arguments.num_key_value_heads or arguments.kinds):
        parser.error("nothing to compare with: give --num_key_value_heads or --kinds")
    if len(set(arguments.kinds)) < len(arguments.kinds):
        parser.error(f"--kinds {' '.join(arguments.kinds)} names one more than once")
    try:
        kinds = [parse_kind(word, "--kinds") for word in arguments.kinds]
    except ValueError as error:
        parser.error(str(error))

    original = load_causal_model(arguments.model_name_or_path, arguments.gguf_file, dtype=arguments.dtype)
    original = original.eval().to(arguments.device)
    for kind in kinds:
        kind.check(original)
    models = changed(original, arguments.num_key_value_heads, kinds)
    rows = []
    samples = (arguments.repeats + 1) + (arguments.first_token_repeats + 1 if arguments.first_token_repeats else 0)
    with tqdm(total=len(arguments.lengths) * len(models) * samples, desc="decode", unit="sample") as bar:
        for length in arguments.lengths:
            ids = torch.randint(
                original.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length)
            )
            ids = ids.to(original.device)
            caches, prompts = {}, {}
            for name, model in models.items():
                caches[name], prompts[name] = prompt(model, ids)
            first: dict[str, list[float]] = {}
            if arguments.first_token_repeats:
                repeats = arguments.first_token_repeats
                first = time_alternately(prompts, repeats, original.device, lambda label: bar.update())
            else:
                for fill in prompts.values():
                    fill()
            held = {name: held_bytes(cache) for name, cache in caches.items()}
            steps = {name: decode_step(model, caches[name]) for name, model in models.items()}
            times = time_alternately(steps, arguments.repeats, original.device, lambda label: bar.update())
            for name, seconds in times.items():
                rows.append({"length": length, "model": name, "seconds": seconds, "cache_bytes": held[name],
                             "first_token_seconds": first.get(name)})  # fmt: skip
    print_rows(rows, f"{Path(arguments.model_name_or_path).name}, {arguments.dtype}, {_machine(original.device)}")
    if arguments.output_file:
        write_json(arguments.output_file, {"arguments": vars(arguments) | {"output_file": None}, "rows": rows})


def changed(
    original: PreTrainedModel, numbers: Sequence[int], kinds: Sequence[GivenKind]
) -> dict[str, PreTrainedModel]:
    """The models by name, the untouched one first."""
    before = attention_layers(original)[0].num_key_value_heads
    models = {f"{before} key/value heads": original}
    for number in numbers:
        converted = hf_attnkit.convert_to_gqa(copy.deepcopy(original), number)  # the method does not change the time
        models[f"{number} key/value heads"] = converted
    if numbers:
        for name, model in list(models.items()):
            models[f"{name} + gqa"] = hf_attnkit.swap_attention(copy.deepcopy(model), "gqa")
    for kind in kinds:
        wanted = kind.specification(original, lambda **_: hf_attnkit.head_importance(original, method="random"))
        models[kind.word] = hf_attnkit.swap_attention(copy.deepcopy(original), wanted)
    return models


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """One row for each length and model; ratios are to the first model of the length."""
    table = Table(title=f"decode, batch size 1: {title}")
    table.add_column("cached tokens", justify="right")
    table.add_column("model", overflow="fold")
    for name in ("tokens per second", "quartiles", "times as fast", "cache, MiB", "ratio"):
        table.add_column(name, justify="right")
    has_first = any(row["first_token_seconds"] for row in rows)
    for name in ("first token, s", "quartiles", "ratio") if has_first else ():
        table.add_column(name, justify="right")
    before: dict[int, dict[str, Any]] = {}
    for row in rows:
        base = before.setdefault(row["length"], row)
        slow, median, fast = (1 / value for value in reversed(quartiles(row["seconds"])))
        cells = [f"{row['length']:,}", row["model"], f"{median:.2f}", f"{slow:.2f} to {fast:.2f}",
                 f"{median * quartiles(base['seconds'])[1]:.2f}", f"{row['cache_bytes'] / 2**20:.1f}",
                 f"{row['cache_bytes'] / base['cache_bytes']:.3f}"]  # fmt: skip
        if has_first:
            low, middle, high = quartiles(row["first_token_seconds"])
            ratio = middle / quartiles(base["first_token_seconds"])[1]
            cells += [f"{middle:.3g}", f"{low:.3g} to {high:.3g}", f"{ratio:.2f}"]
        table.add_row(*cells)
    show(table, 160)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"


if __name__ == "__main__":
    main()
