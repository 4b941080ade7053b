"""What each head of a model looks at: the table printed, and written as JSON and as a picture.

    python recipes/head_statistics.py MODEL --text_file sentences.txt --output_dir outputs/heads

MODEL is a folder or a name on the hub; one text per line. Writes head_statistics.json and head_statistics.png into
--output_dir. How to read them: docs/head_statistics.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_attnkit import head_statistics, load_pretrained
from hf_attnkit.experiment.files import read_texts, write_json
from hf_attnkit.experiment.report.statistics_picture import draw_statistics


def batches(tokenizer: Any, texts: list[str], max_length: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """The texts, padded batch by batch."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in range(0, len(texts), batch_size):
        yield dict(tokenizer(texts[start : start + batch_size], padding=True, truncation=True, max_length=max_length,
                             return_tensors="pt"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of the model and its tokenizer")
    parser.add_argument("--text_file", type=Path, required=True, help="one text per line")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the JSON and the picture")
    parser.add_argument("--num_texts", type=int, default=128, help="number of texts, from the start of the file")
    parser.add_argument("--max_length", type=int, default=128, help="longer texts are truncated, in tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="texts in a batch")
    parser.add_argument("--title", help="title of the picture (default: the names of model and file)")
    arguments = parser.parse_args()
    for name in ("num_texts", "max_length", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    try:
        texts = read_texts(arguments.text_file, arguments.num_texts)
        model, tokenizer = load_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
        inputs = batches(tokenizer, texts, arguments.max_length, arguments.batch_size)
        statistics = head_statistics(model, inputs, separator_ids=tokenizer.sep_token_id)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(statistics)
    write_json(arguments.output_dir / "head_statistics.json", statistics.rows())
    title = arguments.title or f"{Path(arguments.model).name}, {len(texts)} texts of {arguments.text_file.name}"
    draw_statistics(statistics, title, arguments.output_dir / "head_statistics.png")


if __name__ == "__main__":
    main()
