"""What is known of one attention of one example: `AttentionMap`, of tokens or of blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the patches of an image are in a sequence.

    Attributes:
        rows, columns: of patches.
        first: how many tokens come before the first patch (a class token, registers).
    """

    rows: int
    columns: int
    first: int


@dataclass(frozen=True)
class Sequence:
    """The tokens of one example that queries or keys are of.

    Attributes:
        name: of the model's part, such as "encoder.layers".
        labels: one for each token.
        is_text: whether the labels are of tokens of a text.
        block: how many tokens a unit of the maps is: 1 where they are exact.
        grid: of patches, where the tokens are those of an image.
        pixels: `(height, width, 3)` uint8, what the patches are of.
    """

    name: str
    labels: tuple[str, ...]
    is_text: bool
    block: int
    grid: Grid | None = None
    pixels: Tensor | None = None

    @property
    def units(self) -> int:
        """Rows or columns of the maps."""
        return -(-len(self.labels) // self.block)


@dataclass(frozen=True)
class Links:
    """The strongest keys of queries, for maps that are pooled.

    Attributes:
        stride: of which queries: 0, stride, 2 * stride, ...
        keys: `(heads, queries, k)` int32, strongest first.
        weights: `(heads, queries, k)` float32.
    """

    stride: int
    keys: Tensor
    weights: Tensor


@dataclass(frozen=True)
class AttentionMap:
    """One attention of one example, as the model's own kind computes it. Heads are query heads.

    Attributes:
        layer: its number, as of `head_importance` and `prune_heads`.
        call: which call of the layer's module in one forward pass it is (ALBERT calls one for each layer).
        name: the layer's number and path.
        kind: what the layer runs.
        queries, keys: numbers of the sequences.
        is_cross: whether they are two.
        num_key_value_heads: consecutive query heads share one.
        streaming: query heads that see the first tokens and a window only, where others of the layer see all.
        missing: why there is nothing to see: then all that follows is `None`.
        weights: `(heads, rows, columns)` float32 or better: of each query (a mean over those of a block) what each key
            (the keys of a block together) gets.
        sink: `(heads, rows)`, what a learned sink gets: it and the weights sum to 1. `None` without one.
        visible: `(1 or heads, rows, columns)` bool: whether a query sees a key, in a block some query some key.
        links: the strongest keys of single queries; `None` where the map is exact.
        entropy: `(heads,)` nats, as `head_statistics`; NaN where no query has a choice.
        distance: `(heads,)` tokens, mean distance of what is attended to, as `head_statistics`.
        confidence: `(heads,)`, mean of the largest weight, as `head_statistics`.
    """

    layer: int
    call: int
    name: str
    kind: str
    queries: int
    keys: int
    is_cross: bool
    num_key_value_heads: int
    streaming: tuple[int, ...] = ()
    missing: str = ""
    weights: Tensor | None = None
    sink: Tensor | None = None
    visible: Tensor | None = None
    links: Links | None = None
    entropy: Tensor | None = None
    distance: Tensor | None = None
    confidence: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """How many heads are shown."""
        return 0 if self.weights is None else len(self.weights)

    @property
    def distributions(self) -> Tensor:
        """`(heads, rows, columns)`, or one column more for a learned sink: rows that sum to 1 (0 without a key)."""
        assert self.weights is not None
        return self.weights if self.sink is None else torch.cat([self.weights, self.sink[..., None]], -1)


@dataclass(frozen=True)
class Example:
    """One example: its sequences, and the attentions in the order in which they ran."""

    sequences: tuple[Sequence, ...]
    maps: tuple[AttentionMap, ...]

    @property
    def is_exact(self) -> bool:
        """Whether the maps are of tokens and not of blocks."""
        return all(sequence.block == 1 for sequence in self.sequences)
