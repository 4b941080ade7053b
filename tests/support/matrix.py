"""The shared test matrix: every implementation, the options to test it with, and what it must equal.

An implementation may have several cases: the first word of a case's name is the implementation's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from support.reference import (
    Text,
    attend,
    everything,
    phi,
    plain_hedgehog,
    window,
    window_and_global,
    window_and_random,
    window_and_sinks,
)
from torch import Tensor

from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.table import IMPLEMENTATIONS


@dataclass(frozen=True)
class Case:
    """One implementation under test.

    Attributes:
        options: its options.
        pattern: which keys a query may see, see `reference`.
        exact: computes the model's own attention, whatever the sequence.
        softmax: which of these count by e^score: all, none or a pattern; the others by their features.
        features: of queries and keys, for linear attention.
        grouped: takes more than one key/value head.
        matrix: takes a full (queries x keys) mask, and a bias of the scores.
        crosses: runs in cross-attention too.
        first: needs to know where a text begins, which a full mask of a step with a cache does not tell.
        hidden_rows: padding's own queries follow the pattern too, instead of giving just anything.
        kernel: one of ours computes it, not PyTorch's.
    """

    options: dict[str, Any] = field(default_factory=dict)
    pattern: Callable[..., Tensor] = everything
    exact: bool = True
    softmax: bool | Callable[..., Tensor] = True
    features: Callable[[Tensor], Tensor] = phi
    grouped: bool = True
    matrix: bool = True
    crosses: bool = True
    first: bool = False
    hidden_rows: bool = True
    kernel: bool = True


BLOCKS = {"num_random_blocks": 2, "block_size": 4, "seed": 3}
MATRIX: dict[str, Case] = {
    "mha": Case(),
    "gqa": Case(),
    "mqa": Case(grouped=False),
    "sliding_window": Case({"window": 5}, partial(window, 5), exact=False, crosses=False),
    "sliding_window sinks": Case(
        {"window": 5, "num_sink_tokens": 3}, partial(window_and_sinks, 5, 3), exact=False, crosses=False, first=True
    ),
    "local_global": Case(
        {"window": 4, "num_global_tokens": 2},
        partial(window_and_global, 4, 2),
        exact=False,
        crosses=False,
        first=True,
    ),
    "local_global random": Case(
        {"window": 2, "num_global_tokens": 1, **BLOCKS},
        partial(window_and_random, 2, 1, 2, 4, 3),
        exact=False,
        crosses=False,
        first=True,
        hidden_rows=False,
    ),
    "flash": Case(kernel=False),
    "flash tiled": Case({"backend": "tiled"}),
    "flash window": Case({"window": 7}, partial(window, 7), exact=False, crosses=False),
    "linear": Case(exact=False, softmax=False, matrix=False, crosses=False),
    "linear hedgehog": Case(
        {"feature_map": "hedgehog"},
        exact=False,
        softmax=False,
        features=plain_hedgehog,
        matrix=False,
        crosses=False,
    ),
    "linear hybrid": Case({"window": 4}, exact=False, softmax=partial(window, 4), matrix=False, crosses=False),
}
COVERED = list(dict.fromkeys(name.split()[0] for name in MATRIX))  # must be all registered implementations
EXACT = [name for name, case in MATRIX.items() if case.exact]
# Options that make every pattern cover a whole short sequence.
LONG = {"sliding_window": {"window": 200}, "local_global": {"window": 200}}

# BERT has one key/value head after convert_to_mqa only, see test_swap_save.py and test_conversion.py.
WITH_FAMILY = [(name, family) for name in MATRIX for family in ("bert", "llama", "mistral")]
WITH_FAMILY.remove(("mqa", "bert"))


def kind(name: str) -> str:
    """The implementation of a case."""
    return name.split()[0]


def run(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any) -> Tensor:
    """The implementation's output with its options of the matrix."""
    options = {"scaling": query.shape[-1] ** -0.5} | MATRIX[name].options | options
    implementation = IMPLEMENTATIONS[kind(name)]
    if hasattr(implementation, "create_parameters"):
        sizes = query.shape[1], key.shape[1], query.shape[3]
        options["parameters"] = implementation.create_parameters(*sizes, **MATRIX[name].options)
    output = implementation.attention(query, key, value, mask, **options)[0]
    rows = open_rows(name, mask)
    return output if rows is None else output.masked_fill(rows, 0.0)


def open_rows(name: str, mask: Mask) -> Tensor | None:
    """`(B, 1, Q, 1)` bool, True for padding's own queries where the case says nothing about them."""
    if MATRIX[name].hidden_rows or mask.key_visible is None:
        return None
    index = (mask.query_position - mask.key_position[:, :1]).expand(mask.key_visible.shape[0], -1)
    return ~mask.key_visible.gather(1, index)[:, None, :, None]


def visible(name: str, mask: Mask) -> Tensor:
    """`(B, 1 or H, Q, K)`: what the definition lets each query see, from the mask's fields alone."""
    where = text(mask)
    seen = MATRIX[name].pattern(where)[:, None]
    if mask.dense is not None:
        return seen & mask.dense
    if mask.is_causal:
        seen = seen & (where.j <= where.i)[:, None]
    return seen if mask.key_visible is None else seen & mask.key_visible[:, None, None, :]


def text(mask: Mask) -> Text:
    """Where the queries and keys of a mask stand."""
    i, j = mask.query_position[:, :, None], mask.key_position[:, None, :]
    first, last = j[..., :1], j[..., -1:]
    if mask.key_visible is not None:
        far = torch.iinfo(torch.long).max // 2
        first = torch.where(mask.key_visible, mask.key_position, far).amin(-1)[:, None, None]
        last = torch.where(mask.key_visible, mask.key_position, -1).amax(-1)[:, None, None]
    return Text(i, j, first, last, mask.is_causal)


def by_score(name: str, where: Text) -> bool | Tensor:
    """What `reference.attend` takes as `softmax`."""
    softmax = MATRIX[name].softmax
    return softmax if isinstance(softmax, bool) else softmax(where)[:, None]


def expected(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any) -> Tensor:
    """The same by definition."""
    options = {"scaling": query.shape[-1] ** -0.5, "bias": mask.bias} | options
    options |= {"softmax": by_score(name, text(mask)), "features": MATRIX[name].features}
    output = attend(query, key, value, visible(name, mask), **options)
    rows = open_rows(name, mask)
    return output if rows is None else output.masked_fill(rows, 0.0)
