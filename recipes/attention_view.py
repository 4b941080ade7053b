"""What each head of a model attends to, as one page; with `--compare`, before and after a change.

    python recipes/attention_view.py MODEL --text "The keys to the cabinet are on the table." --output_file page.html

MODEL is a folder or a name on the hub. `--text_file` takes the first texts of a file, one a line; `--image` a picture,
for models of images, or of images and texts; `--target` what an encoder-decoder's decoder is given. `--compare` is the
same model after a change, such as the --output_dir of a recipe. What is on the page: docs/attention_view.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from hf_attnkit import attention_view, head_importance, load_pretrained
from hf_attnkit.experiment.files import read_texts


def text_inputs(model: str, texts: list[str], target: str | None, max_length: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and what the model is given."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    inputs = dict(tokenizer(texts, **options))
    if target is not None:
        given = tokenizer([target] * len(texts), **options)
        inputs |= {f"decoder_{name}": given[name] for name in ("input_ids", "attention_mask")}
    return tokenizer, inputs


def image_inputs(model: str, path: Path, texts: list[str]) -> tuple[Any, dict[str, Any]]:
    """The processor, and what the model is given: a picture, with texts for a model of both."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if not texts:
        return None, dict(AutoImageProcessor.from_pretrained(model)(images=picture, return_tensors="pt"))
    processor = AutoProcessor.from_pretrained(model)
    return processor, dict(processor(images=picture, text=texts, padding=True, return_tensors="pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of the model and its tokenizer or processor")
    parser.add_argument("--text", nargs="+", default=[], help="texts")
    parser.add_argument("--text_file", type=Path, help="one text per line")
    parser.add_argument("--num_texts", type=int, default=3, help="number of texts, from the start of the file")
    parser.add_argument("--target", help="text that a decoder is given, of an encoder-decoder")
    parser.add_argument("--image", type=Path, help="picture file")
    parser.add_argument("--compare", help="folder of the model after a change")
    parser.add_argument("--importance", help="score of the heads to show with them, such as entropy_contribution")
    parser.add_argument("--max_length", type=int, default=512, help="longer texts are truncated, in tokens")
    parser.add_argument("--title", help="of the page (default: the model's name)")
    parser.add_argument("--output_file", type=Path, required=True, help="the page")
    arguments = parser.parse_args()
    for name in ("num_texts", "max_length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if not (arguments.text or arguments.text_file or arguments.image):
        parser.error("give --text, --text_file or --image")
    if arguments.image and arguments.target:
        parser.error("--target is for encoder-decoders of texts: leave it out with --image")
    try:
        texts = list(arguments.text)
        if arguments.text_file:
            texts += read_texts(arguments.text_file, arguments.num_texts)
        if arguments.image:
            tokenizer, inputs = image_inputs(arguments.model, arguments.image, texts)
        else:
            tokenizer, inputs = text_inputs(arguments.model, texts, arguments.target, arguments.max_length)
        model = load_pretrained(arguments.model)
        arguments.output_file.parent.mkdir(parents=True, exist_ok=True)
        attention_view(
            model,
            inputs,
            tokenizer,
            compare=load_pretrained(arguments.compare) if arguments.compare else None,
            path=arguments.output_file,
            title=arguments.title or f"Attention of {Path(arguments.model).name}",
            importance=head_importance(model, [inputs], method=arguments.importance) if arguments.importance else None,
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(arguments.output_file)


if __name__ == "__main__":
    main()
