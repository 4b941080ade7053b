"""What the rows and columns of attention maps are: tokens of a text, patches of an image, or numbers.

Attentions in one list of blocks have their queries in one sequence: `encoder.block`, `decoder.block`,
`vision_model.encoder.layers`. The keys of a cross-attention are those of the list that ran before and has as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.analysis.view.maps import Grid
from hf_attnkit.models.layers import AttentionLayer

EXTRA_TOKENS = 8  # a class token, a distillation token and registers; more are no patches' sequence


@dataclass(frozen=True)
class Place:
    """Which sequence of the model, not of an example: a list of blocks, and how many tokens with padding."""

    stack: str
    length: int


def stack_of(path: str) -> str:
    """The path up to the number of the block: "encoder.layer.3.attention" is in "encoder.layer"."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[:number])


def keys_of(layer: AttentionLayer, own: Place, length: int, known: list[Place]) -> Place:
    """The sequence of an attention's keys, given that of its queries.

    Args:
        known: sequences of the attentions that ran before.
    """
    if not layer.is_cross and length == own.length:
        return own
    others = [place for place in known if place.stack != own.stack and place.length == length]
    return others[-1] if others and layer.is_cross else Place(f"keys of {own.stack}", length)


class Labels:
    """Names tokens of the model's inputs."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], tokenizer: Any) -> None:
        """
        Args:
            tokenizer: a tokenizer, a processor that has one, or `None`.
        """
        self._model, self._inputs = model, inputs
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

    def of(self, place: Place, row: int, real: Tensor) -> tuple[tuple[str, ...], bool]:
        """Labels of the tokens that are no padding, and whether they are of a text.

        Args:
            real: bool, `(place.length,)`.
        """
        ids = self._ids(place)
        if ids is None or row >= len(ids):
            return tuple(map(str, range(int(real.sum())))), False
        numbers = ids[row][real.to(ids.device)].tolist()
        return tuple(map(self._label, numbers)), True

    def _label(self, number: int) -> str:
        if self._tokenizer is None:
            return str(number)
        text = str(self._tokenizer.decode([number]))
        if text.strip() and "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        return str(self._tokenizer.convert_ids_to_tokens(number)) if text.strip() or not text else repr(text)[1:-1]

    def _ids(self, place: Place) -> Tensor | None:
        """`(rows, tokens)`, or `None` for what is no text, or not known."""
        parts = place.stack.split(".")
        part = part_of(self._model, place.stack)
        if part.main_input_name != "input_ids" and self._model.main_input_name != part.main_input_name:
            return None
        decodes = self._model.config.is_encoder_decoder and any("decoder" in name for name in parts)
        ids = self._inputs.get("decoder_input_ids" if decodes else "input_ids")
        if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.shape[-1] != place.length:
            return None
        return ids.flatten(0, -2)

    def grid(self, place: Place) -> Grid | None:
        """Where patches are in a sequence, or `None` where it is of no image, or that cannot be told."""
        pixels = self.pixels(place)
        config = part_of(self._model, place.stack).config
        size = getattr(config, "patch_size", None)
        if pixels is None or size is None or hasattr(config, "num_detection_tokens"):
            return None
        high, wide = size if isinstance(size, (list, tuple)) else (size, size)
        rows, columns = pixels.shape[-2] // high, pixels.shape[-1] // wide
        extra = place.length - rows * columns
        return Grid(rows, columns, extra) if rows and columns and 0 <= extra <= EXTRA_TOKENS else None

    def pixels(self, place: Place) -> Tensor | None:
        """`(rows, channels, height, width)`, where the sequence is of images."""
        if part_of(self._model, place.stack).main_input_name != "pixel_values":
            return None
        pixels = self._inputs.get("pixel_values")
        return pixels if isinstance(pixels, Tensor) and pixels.dim() == 4 else None


def part_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model with a forward of its own that a module is in."""
    parts = path.split(".")
    for stop in range(len(parts), 0, -1):
        try:
            inside = model.get_submodule(".".join(parts[:stop]))
        except AttributeError:  # "keys of ..."
            continue
        if isinstance(inside, PreTrainedModel) and "forward" in vars(type(inside)):
            return inside
    return model


def patch_labels(grid: Grid, length: int) -> tuple[str, ...]:
    """Names of an image's tokens: those before the patches, and each patch by row and column."""
    before = [f"[extra {number}]" if grid.first > 1 else "[class]" for number in range(grid.first)]
    patches = [f"{row},{column}" for row in range(grid.rows) for column in range(grid.columns)]
    return (*before, *patches)[:length]


def shown_pixels(pixels: Tensor) -> Tensor:
    """`(height, width, 3)` uint8 of what the model was given, `(channels, height, width)`; its range becomes 0 to 255.

    The processor's mean and deviation are not the model's to know.
    """
    image = pixels.detach().float().cpu()
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    low, high = image.amin(), image.amax()
    scaled = (image - low) / (high - low).clamp(min=1e-12) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous()
