"""Keep a random key head and a random value head of each group: the baseline of `first`.

Drawn from PyTorch's generator, so `torch.manual_seed` or `transformers.set_seed` fixes the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.conversion.heads import Heads


def key(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The unchanged queries, and one of the key heads."""
    return heads.query, heads.key[_draw(heads)]


def value(heads: Heads, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """One of the value heads, and the unchanged output projections."""
    return heads.value[_draw(heads)], heads.output


def _draw(heads: Heads) -> int:
    return int(torch.randint(len(heads.key), ()))
