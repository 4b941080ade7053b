"""The tiles of an attention pattern, and their masked scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attnkit.attention.eight_bits import decode
from hf_attnkit.attention.mask import Mask

QUERY_TILE = 256


WINDOW_QUERY_TILE = 64  # a band is window + tile keys wide, so smaller tiles waste less of it


KEY_TILE = 512


@dataclass(frozen=True)
class Extra:
    """Keys that queries see besides their window. T is 1 (all queries) or the number of query tiles.

    A key that lies in a query's window as well is counted there, and only there.

    Attributes:
        key, value: `(B, num_key_value_heads, T, E, head_dim)`.
        index: `(B, T, E)`, the key's index in the sequence.
        visible: `(B, T, E)` bool, False for padding.
        tile: queries per tile; the kernel's own query tiles take this size if T > 1.
    """

    key: Tensor
    value: Tensor
    index: Tensor
    visible: Tensor
    tile: int = 0


@dataclass(frozen=True)
class Problem:
    """The operators' arguments, and what their tiles are."""

    key: Tensor
    value: Tensor
    key_visible: Tensor | None
    dense: Tensor | None
    bias: Tensor | None
    offset: int
    extra: Extra | None
    is_causal: bool
    window: int
    q_length: int
    softcap: float | None = None
    document: Tensor | None = None

    def query_tiles(self) -> Iterator[slice]:
        size = WINDOW_QUERY_TILE if self.window else QUERY_TILE
        if self.extra is not None and self.extra.tile:
            size = self.extra.tile
        for start in range(0, self.q_length, size):
            yield slice(start, min(start + size, self.q_length))

    def key_tiles(self, queries: slice) -> Iterator[slice]:
        """The tiles of keys of which these queries may see a part."""
        first, last = queries.start + self.offset, queries.stop - 1 + self.offset
        if self.dense is not None:  # rows may be at different positions, so nothing is known to be hidden
            first, last = 0, self.key.shape[2] - 1
        begin = max(0, first - self.window + 1) if self.window else 0
        end = last + 1 if self.is_causal else last + self.window if self.window else self.key.shape[2]
        end = min(end, self.key.shape[2])
        # A band little longer than a tile is one tile.
        size = KEY_TILE if end - begin > 2 * KEY_TILE else max(end - begin, 1)
        for start in range(begin, end, size):
            yield slice(start, min(start + size, end))

    def scores(self, query: Tensor, queries: slice, keys: slice) -> Tensor:
        """Masked scores `(B, H, q, k)` of a tile, float32 or better; `query` is scaled."""
        scores = product(query, decode(self.key[:, :, keys], query.dtype))
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        if self.bias is not None:
            scores = scores + self.bias[..., queries if self.bias.shape[-2] > 1 else slice(None), keys]
        visible = None if self.key_visible is None else self.key_visible[:, None, None, keys]
        if self.dense is not None:
            dense = self.dense[..., queries if self.dense.shape[-2] > 1 else slice(None), keys]
            visible = dense if visible is None else visible & dense
        elif (near := self._near(queries, keys)) is not None:
            visible = near if visible is None else visible & near
        if self.document is not None:
            own = slice(queries.start + self.offset, queries.stop + self.offset)
            same = self.document[:, None, own, None] == self.document[:, None, None, keys]
            visible = same if visible is None else visible & same
        return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)

    def _near(self, queries: slice, keys: slice) -> Tensor | None:
        """`(q, k)`, True where causality and window allow; `None` where they hide nothing of the tile."""
        first, last = queries.start + self.offset, queries.stop - 1 + self.offset
        past = not self.is_causal or keys.stop - 1 <= first
        inside = not self.window or (
            last - keys.start < self.window and (self.is_causal or keys.stop - 1 - first < self.window)
        )
        if past and inside:
            return None
        positions = torch.arange(first, last + 1, device=self.key.device)[:, None]
        distance = positions - torch.arange(keys.start, keys.stop, device=self.key.device)
        near = distance < self.window if self.window else distance > -self.key.shape[2] - self.q_length
        if self.is_causal:
            return near & (distance >= 0)
        return near & (distance > -self.window) if self.window else near

    def extra_scores(self, query: Tensor, queries: slice, tile: int) -> Tensor:
        """Masked scores `(B, H, q, E)` of a tile of queries with its extra keys."""
        extra = self.extra
        assert extra is not None
        scores = product(query, decode(extra.key[:, :, tile], query.dtype))
        positions = torch.arange(queries.start, queries.stop, device=query.device) + self.offset
        distance = positions[None, :, None] - extra.index[:, tile, None, :]  # (B, q, E)
        outside = distance >= self.window if self.is_causal else distance.abs() >= self.window
        return scores.masked_fill_(~(outside & extra.visible[:, tile, None, :])[:, None], -torch.inf)

    def extra_tile(self, queries: slice) -> int:
        assert self.extra is not None
        return queries.start // self.extra.tile if self.extra.key.shape[2] > 1 else 0


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_visible: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_index: Tensor | None,
    extra_visible: Tensor | None,
    document: Tensor | None,
    extra_tile: int,
    is_causal: bool,
    window: int,
) -> Problem:
    extra = None
    if extra_key is not None:
        assert extra_value is not None and extra_index is not None and extra_visible is not None
        extra = Extra(extra_key, extra_value, extra_index, extra_visible, extra_tile)
    start = key.shape[2] - query.shape[2] if offset is None else int(offset)
    return Problem(
        key, value, key_visible, dense, bias, start, extra, is_causal, window, query.shape[2], document=document
    )  # fmt: skip


def score_tiles(
    query: Tensor, key: Tensor, mask: Mask, *, scaling: float, window: int | None = None
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """The masked scores that `attend` would go through, for those who look at them without attending.

    Arguments as `attend`; `mask.softcap` is applied. For each tile of queries: which they are, and their scores
    `(B, num_heads, q, k)` with one tile of keys after the other, -inf where hidden, in float32 or better; they may be
    overwritten.
    """
    problem = Problem(
        key, key, mask.key_visible, mask.dense, mask.bias, mask.offset(), None, mask.is_causal, window or 0,
        query.shape[2], mask.softcap, mask.document,
    )  # fmt: skip
    for queries in problem.query_tiles():
        scaled = query[:, :, queries] * scaling
        yield queries, (problem.scores(scaled, queries, keys) for keys in problem.key_tiles(queries))


def stack_groups(tensor: Tensor, num_groups: int) -> Tensor:
    """`"b (n g) q d -> b n (g q) d"`: the heads of a group as one tall matrix."""
    return tensor.reshape(tensor.shape[0], num_groups, -1, tensor.shape[-1])


def product(query: Tensor, key: Tensor) -> Tensor:
    """`(B, H, q, k)` in float32 or better; the heads of a group read their key once."""
    scores = stack_groups(query, key.shape[1]) @ key.transpose(-1, -2)
    scores = scores.view(*query.shape[:3], key.shape[2])
    return scores if scores.dtype == torch.float64 else scores.float()
