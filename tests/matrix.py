"""The shared test matrix: every implementation, the options to test it with, and what it must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from reference import attend, everything, window, window_and_global
from torch import Tensor

from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.registry import IMPLEMENTATIONS


@dataclass(frozen=True)
class Case:
    """One implementation under test.

    Attributes:
        options: its options.
        pattern: which keys a query may see, see `reference`.
        exact: computes the model's own attention, whatever the sequence.
        softmax: otherwise the features of linear attention.
        grouped: takes more than one key/value head.
        matrix: takes a full (queries x keys) mask, and a bias of the scores.
        crosses: runs in cross-attention too.
    """

    options: dict[str, Any] = field(default_factory=dict)
    pattern: Callable[..., Tensor] = everything
    exact: bool = True
    softmax: bool = True
    grouped: bool = True
    matrix: bool = True
    crosses: bool = True


MATRIX: dict[str, Case] = {
    "mha": Case(),
    "gqa": Case(),
    "mqa": Case(grouped=False),
    "sliding_window": Case({"window": 5}, partial(window, 5), exact=False, crosses=False),
    "local_global": Case(
        {"window": 4, "num_global_tokens": 2}, partial(window_and_global, 4, 2), exact=False, crosses=False
    ),
    "flash": Case(),
    "linear": Case(exact=False, softmax=False, matrix=False, crosses=False),
}
EXACT = [name for name, case in MATRIX.items() if case.exact]
# Options that make every pattern cover a whole short sequence.
LONG = {"sliding_window": {"window": 200}, "local_global": {"window": 200}}

# BERT has one key/value head after convert_to_mqa only, see test_swap_save.py and test_conversion.py.
WITH_FAMILY = [(name, family) for name in MATRIX for family in ("bert", "llama", "mistral")]
WITH_FAMILY.remove(("mqa", "bert"))


def run(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any) -> Tensor:
    """The implementation's output with its options of the matrix."""
    options = {"scaling": query.shape[-1] ** -0.5} | MATRIX[name].options | options
    return IMPLEMENTATIONS[name].attention(query, key, value, mask, **options)[0]


def visible(name: str, mask: Mask) -> Tensor:
    """`(B, 1 or H, Q, K)`: what the definition lets each query see, from the mask's fields alone."""
    i, j = mask.query_position[:, :, None], mask.key_position[:, None, :]
    first = j[..., :1]
    if mask.key_visible is not None:
        positions = torch.where(mask.key_visible, mask.key_position, torch.iinfo(torch.long).max)
        first = positions.amin(-1)[:, None, None]
    seen = MATRIX[name].pattern(i, j, first)[:, None]
    if mask.dense is not None:
        return seen & mask.dense
    if mask.is_causal:
        seen = seen & (j <= i)[:, None]
    return seen if mask.key_visible is None else seen & mask.key_visible[:, None, None, :]


def expected(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any) -> Tensor:
    """The same by definition."""
    options = {"scaling": query.shape[-1] ** -0.5, "bias": mask.bias} | options
    return attend(query, key, value, visible(name, mask), softmax=MATRIX[name].softmax, **options)
