"""Time before and after heads are removed, of the forward pass and of its attention blocks, timed alternately.

    python recipes/benchmarks/pruning.py --model_name_or_path outputs/cola --fraction 0.5 --batch_size 32 --length 64

Removes the same share of random heads from every layer, which changes the time as any other choice does. An attention
block is a layer's attention with all its projections (and, where the family has them there, dropout and the norm
behind); its time is that of all blocks of the model one after the other, on the inputs that they get in a forward pass.
Reported: medians, and the ratio with the quartiles of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.experiment.benchmarking.measure import Call, quartiles, time_alternately
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.batches import spare_options


def attention_block(layer: AttentionLayer) -> nn.Module:
    """The smallest part of a layer that holds what attends and its output projection."""
    wanted = {layer.module, layer.output}
    holding = [module for module in layer.block.modules() if wanted <= set(module.modules())]
    return min(holding, key=lambda module: sum(1 for _ in module.modules()))


def attention_blocks(model: PreTrainedModel, inputs: dict[str, Any]) -> Call:
    """Runs all attention blocks on the inputs that they get in a forward pass."""
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((module, args, kwargs))

    hooks = [
        attention_block(layer).register_forward_pre_hook(keep, with_kwargs=True) for layer in attention_layers(model)
    ]
    forward(model, inputs)()
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def run() -> None:
        for module, args, kwargs in seen:
            module(*args, **kwargs)

    return run


def forward(model: PreTrainedModel, inputs: dict[str, Any]) -> Call:
    """Runs the model."""

    @torch.no_grad()
    def run() -> None:
        model(**inputs, **spare_options(model))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub name of a model")
    parser.add_argument("--fraction", type=float, default=0.5, help="share of each layer's heads to remove")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens of each text, no padding")
    parser.add_argument("--repeats", type=int, default=21, help="samples of each side")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=Path, help="JSON of all measurements")
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.length, arguments.repeats) < 1:
        parser.error("--batch_size, --length and --repeats must be at least 1")
    torch.manual_seed(0)
    full = hf_attnkit.load_pretrained(arguments.model_name_or_path, dtype=arguments.dtype).eval().to(arguments.device)
    groups = [layer.num_key_value_heads for layer in attention_layers(full)]
    removed = hf_attnkit.select_heads(
        hf_attnkit.head_importance(full, method="random"),
        fraction=arguments.fraction,
        per_layer=True,
        num_key_value_heads=groups,
    )
    if not removed:
        parser.error(f"--fraction {arguments.fraction} removes no head (or no whole group); ask for more")
    pruned = hf_attnkit.prune_heads(copy.deepcopy(full), removed)
    shape = (arguments.batch_size, arguments.length)
    inputs = {"input_ids": torch.randint(full.config.vocab_size, shape, device=arguments.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    rows = []
    sides = {"full": full, "pruned": pruned}
    for part, kind in (("forward pass", forward), ("attention blocks", attention_blocks)):
        calls = {name: kind(model, inputs) for name, model in sides.items()}
        with tqdm(total=2 * (arguments.repeats + 1), desc=part, unit="sample") as bar:
            times = time_alternately(calls, arguments.repeats, full.device, lambda label: bar.update())
        rows.append({"part": part} | times)
    heads = [sum(len(layer.heads) for layer in attention_layers(model)) for model in sides.values()]
    threads = f"{torch.get_num_threads()} CPU threads"
    machine = torch.cuda.get_device_name() if full.device.type == "cuda" else threads
    title = f"{heads[0]} -> {heads[1]} heads, {shape[0]} x {shape[1]} tokens, {arguments.dtype}, {machine}"
    print_rows(rows, f"{Path(arguments.model_name_or_path).name}: {title}, torch {torch.__version__}")
    if arguments.output_file:
        options = json.loads(json.dumps(vars(arguments), default=str))
        write_json(arguments.output_file, {"arguments": options, "heads": heads, "machine": machine, "rows": rows})


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """One row for each part."""
    table = Table(title=title)
    table.add_column("")
    for name in ("full, ms", "pruned, ms", "pruned / full", "quartiles"):
        table.add_column(name, justify="right")
    for row in rows:
        full, pruned = (quartiles(row[side])[1] for side in ("full", "pruned"))
        low, _, high = quartiles([after / before for before, after in zip(row["full"], row["pruned"], strict=True)])
        table.add_row(row["part"], f"{1e3 * full:.1f}", f"{1e3 * pruned:.1f}", f"{pruned / full:.2f}",
                      f"{low:.2f} to {high:.2f}")  # fmt: skip
    show(table)


if __name__ == "__main__":
    main()
