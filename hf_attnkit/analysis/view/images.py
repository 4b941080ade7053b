"""Pictures that a user gives, as arrays: of Pillow, NumPy or torch, checked against what the model saw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = 512  # pixels along a side on the page
PROPORTION = 0.02  # how far the sides' ratio may be from the model's


def given_images(image: Any, count: int) -> list[Tensor]:
    """`count` pictures `(height, width, 3)` uint8; a single one for a single example.

    Raises:
        TypeError: for what is no picture.
        ValueError: for another number of pictures, or a shape that is none.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) != count:
        raise ValueError(f"image holds {len(images)} picture(s) and the inputs {count}; give one for each, in a list")
    return [_picture(each) for each in images]


def _picture(image: Any) -> Tensor:
    if hasattr(image, "convert"):  # Pillow's: whatever its mode is
        image = image.convert("RGB")
    try:
        array = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.dtype == object or array.dtype.kind in "US":
        raise TypeError(
            f"image is a {type(image).__name__}; give a picture as Pillow opens it, or an array (height, width, 3) of "
            "uint8"
        )
    if array.ndim == 2:
        array = np.stack([array] * 3, -1)
    if array.ndim != 3 or array.shape[2] < 3 or not array.size:
        raise ValueError(f"image has shape {array.shape}; it must be (height, width, 3)")
    array = array[..., :3]
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > (1 if array.dtype.kind == "f" else 255):
            raise ValueError(
                f"image holds numbers from {array.min():.4g} to {array.max():.4g}; give uint8, or floats from 0 to 1"
            )
        array = np.round(array * 255 if array.dtype.kind == "f" else array)
    step = -(-max(array.shape[:2]) // LARGEST)
    return torch.from_numpy(np.ascontiguousarray(array[::step, ::step]).astype(np.uint8))


def require_proportions(image: Tensor, pixels: Tensor) -> None:
    """Raise `ValueError` where a picture cannot be what the model saw: patches would lie in other places.

    Args:
        image: `(height, width, 3)`.
        pixels: `(..., height, width)`.
    """
    own, seen = image.shape[1] / image.shape[0], pixels.shape[-1] / pixels.shape[-2]
    if abs(own / seen - 1) > PROPORTION:
        raise ValueError(
            f"image is {image.shape[1]} x {image.shape[0]} and the model saw {pixels.shape[-1]} x {pixels.shape[-2]}, "
            "which a processor cuts out of it: give the picture cut to the same proportions, or leave image out, and "
            "the page shows pixel_values"
        )
