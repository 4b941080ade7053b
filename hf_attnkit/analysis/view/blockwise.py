"""The weights of one attention call, added up block by block: never a whole matrix of a long input.

For each example the softmax of a block of queries is formed over all keys, for all heads of the layer, at most
`BLOCK_NUMBERS` numbers at a time. It is added to a map of units: tokens, or blocks of consecutive tokens. With b_q
queries in a block of rows and any keys in a block of columns,

    map[r, c] = 1 / b_q  sum_{i in r} sum_{j in c} p_ij

so a row is a distribution over the blocks of keys, and with blocks of one token the map is the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.analysis.head_statistics import masked_scores, weights_and_sink
from hf_attnkit.analysis.view.maps import Links
from hf_attnkit.attention.mask import Mask

BLOCK_NUMBERS = 2**20  # 4 MiB of float32
STATISTICS = ("entropy", "confidence", "distance")


@dataclass(frozen=True)
class Units:
    """Which queries and keys of a row of the batch count, and how many of them are one unit.

    Attributes:
        row: of the batch.
        queries, keys: bool, of all in the batch those that are no padding.
        query_block, key_block: tokens in a unit.
        links: how many keys to keep of each query; 0 for none.
        stride: of which queries.
    """

    row: int
    queries: Tensor
    keys: Tensor
    query_block: int
    key_block: int
    links: int = 0
    stride: int = 1


class Sums:
    """Running sums of one row of the batch."""

    def __init__(self, units: Units, num_heads: int, mask: Mask, is_cross: bool, dtype: torch.dtype) -> None:
        self.units, self.is_cross = units, is_cross
        device = mask.key_position.device
        self._place = units.queries.to(device).cumsum(0) - 1  # of each query among those that count
        self._keys = units.keys.to(device)
        self.num_queries, self.num_keys = int(units.queries.sum()), int(units.keys.sum())
        rows, columns = -(-self.num_queries // units.query_block), -(-self.num_keys // units.key_block)
        self._columns = columns
        self.weights = torch.zeros(num_heads, rows, columns, dtype=dtype, device=device)
        self.sink = None if mask.sinks is None else self.weights.new_zeros(num_heads, rows)
        self.seen: Tensor | None = None
        self._counts = self.weights.new_zeros(rows)
        self._sums = {name: torch.zeros(num_heads, dtype=torch.float64) for name in STATISTICS}
        self._chosen = torch.zeros(num_heads, dtype=torch.float64)
        self._links: list[tuple[Tensor, Tensor]] = []

    def add(self, queries: slice, p: Tensor, sink: Tensor | None, shown: Tensor, choices: Tensor) -> None:
        """`p` `(H, q, K)`, `sink` `(H, q, 1)`, `shown` `(1 or H, q, K)`, `choices` `(1 or H, q)` bool."""
        own = self.units.queries[queries].to(p.device)
        if not own.any():
            return
        place = self._place[queries][own]
        p, shown, choices = p[:, own][..., self._keys], shown[:, own][..., self._keys], choices[:, own]
        row = place // self.units.query_block
        self.weights.index_add_(1, row, self._by_block(p))
        self._counts.index_add_(0, row, torch.ones_like(row, dtype=self._counts.dtype))
        seen = self.weights.new_zeros(len(shown), *self.weights.shape[1:]) if self.seen is None else self.seen
        self.seen = seen.index_add_(1, row, self._by_block(shown.to(p.dtype)))
        every = p
        if sink is not None and self.sink is not None:
            own_sink = sink[:, own]
            self.sink.index_add_(1, row, own_sink[..., 0])
            every = torch.cat([p, own_sink], -1)
        self._add("entropy", torch.special.entr(every).sum(-1), choices)
        self._add("confidence", every.amax(-1), choices)
        if not self.is_cross:
            ahead = (torch.arange(self.num_keys, device=p.device) - place[:, None]).abs().to(p.dtype)
            total = p.sum(-1)
            self._add("distance", (p * ahead).sum(-1) / total.masked_fill(total == 0, 1.0), choices)
        self._chosen += choices.expand(len(p), -1).sum(-1).double().cpu()
        if self.units.links:
            some = place % self.units.stride == 0
            strongest = p[:, some].topk(min(self.units.links, self.num_keys), -1)
            self._links.append((strongest.indices.int().cpu(), strongest.values.float().cpu()))

    def _by_block(self, p: Tensor) -> Tensor:
        if self.units.key_block == 1:
            return p
        padded = F.pad(p, (0, self._columns * self.units.key_block - self.num_keys))
        return padded.reshape(*p.shape[:-1], self._columns, -1).sum(-1)

    def _add(self, name: str, values: Tensor, choices: Tensor) -> None:
        self._sums[name] += values.masked_fill(~choices, 0.0).sum(-1).double().cpu()

    def map(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weights, those of a sink, and what is visible, see `AttentionMap`."""
        counts = self._counts.clamp(min=1)
        sink = None if self.sink is None else (self.sink / counts).cpu()
        assert self.seen is not None
        return (self.weights / counts[:, None]).cpu(), sink, (self.seen > 0).cpu()

    def statistics(self) -> dict[str, Tensor]:
        """`(heads,)` each; NaN where no query sees two keys, and for a distance in two sequences."""
        found = {name: (self._sums[name] / self._chosen).float() for name in STATISTICS}
        if self.is_cross:
            found["distance"] = torch.full_like(found["distance"], torch.nan)
        return found

    def links(self) -> Links | None:
        """The strongest keys, numbered among those that count."""
        if not self._links:
            return None
        keys, weights = (torch.cat(parts, 1) for parts in zip(*self._links, strict=True))
        return Links(self.units.stride, keys, weights)


def add_up(query: Tensor, key: Tensor, mask: Mask, scaling: float, is_cross: bool, units: Units) -> Sums:
    """The sums of one row of the batch; shapes as in `Kind.attention`.

    Raises:
        ValueError: for scores that are not finite.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = Sums(units, query.shape[1], mask, is_cross, dtype)
    one, own = slice(units.row, units.row + 1), row_of(mask, units.row)
    for queries, p, sink, shown in _softmax(query[one], key[one], own, scaling):
        shown = shown & units.keys.to(shown.device)
        sums.add(queries, p, sink, shown, shown.sum(-1) > (1 if mask.sinks is None else 0))
    return sums


def _softmax(
    query: Tensor, key: Tensor, mask: Mask, scaling: float
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """Of one example, block by block: queries, weights `(H, q, K)`, the sink's `(H, q, 1)`, `(1 or H, q, K)` seen."""
    block = max(1, BLOCK_NUMBERS // (query.shape[1] * key.shape[2]))
    for queries, scores, visible in masked_scores(query, key, mask, scaling, block):
        shown = torch.ones_like(scores[:, :1], dtype=torch.bool) if visible is None else visible
        shown = shown.expand(-1, -1, scores.shape[2], scores.shape[3])
        p, sink = weights_and_sink(scores, shown, mask.sinks)
        if not p.isfinite().all():
            raise ValueError(
                "attention scores contain NaN or infinity; run the model in bfloat16 or float32 and look for an input "
                "that breaks it"
            )
        yield queries, p[0], None if sink is None else sink[0], shown[0]


def row_of(mask: Mask, row: int) -> Mask:
    """The mask of one row of the batch."""
    names = ("query_position", "key_position", "key_visible", "dense", "bias")
    parts = {name: getattr(mask, name) for name in names}
    return replace(mask, **{n: t[row : row + 1] for n, t in parts.items() if t is not None and len(t) > 1})
