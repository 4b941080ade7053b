"""Run text through a model and write the second moments of its attention inputs, for `convert_checkpoint.py`.

    python recipes/collect_statistics.py MODEL statistics.safetensors --train_file text.txt

MODEL has to fit into memory; one text per line. The file takes (hidden size + 1)^2 * 4 bytes per layer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_attnkit import load_pretrained
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.models.layers import projected_layers


def batches(tokenizer: Any, path: Path, num_tokens: int, max_length: int) -> Iterator[dict[str, Any]]:
    """Texts one by one, so that none is padded, until there are `num_tokens` tokens."""
    seen = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if not line.strip():
                continue
            left = min(max_length, num_tokens - seen)
            inputs = tokenizer(line.strip(), truncation=True, max_length=left, return_tensors="pt")
            inputs = {name: tensor[:, :left] for name, tensor in inputs.items()}
            seen += inputs["input_ids"].numel()
            yield inputs
            if seen >= num_tokens:
                return
    print(f"{path} has {seen:,} tokens, fewer than --num_tokens {num_tokens:,}")


def write_statistics(model_path: str, target: Path, train_file: Path, num_tokens: int, max_length: int) -> None:
    """Collect and save, in one step: the file is absent or complete."""
    if num_tokens < 1 or max_length < 1:
        raise ValueError(f"--num_tokens {num_tokens} and --max_length {max_length} must be at least 1")
    if not train_file.is_file():
        raise FileNotFoundError(f"--train_file {train_file} does not exist")
    model, tokenizer = load_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    layers = projected_layers(model)
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    statistics = collect(model, layers, batches(tokenizer, train_file, num_tokens, min(max_length, longest)))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    statistics.save(partial)
    os.replace(partial, target)
    print(f"{target}: {len(layers)} layers, {statistics.num_tokens:,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of the model and its tokenizer")
    parser.add_argument("target", metavar="OUT.safetensors", type=Path, help="file to write")
    parser.add_argument("--train_file", type=Path, required=True, help="one text per line")
    parser.add_argument("--num_tokens", type=int, default=8192, help="number of tokens, from the start of the file")
    parser.add_argument("--max_length", type=int, default=512, help="longer texts are truncated, in tokens")
    arguments = parser.parse_args()
    try:
        write_statistics(
            arguments.model, arguments.target, arguments.train_file, arguments.num_tokens, arguments.max_length
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
