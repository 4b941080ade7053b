"""Which keys each query may see, kept as positions instead of a matrix.

Transformers builds one mask per forward pass and hands the same tensor to every layer. Ours travels
in that slot in one of five forms, and `Mask.receive` turns each into a `Mask`:

| tensor                                | meaning                                                    |
| ------------------------------------- | ---------------------------------------------------------- |
| `None`                                | nothing is hidden but the future (if causal)               |
| integer `(batch, 1, 1, keys+queries)` | positions of the keys, then of the queries; a hidden key   |
|                                       | carries the bitwise complement of its position             |
| integer `(batch, 2, 1, keys+queries)` | the same, and the size of a model's own window (Mistral),  |
|                                       | which applies too; it also comes as `sliding_window`       |
| integer `(batch, 1, 2, keys+queries)` | packed rows: the first form, and below each position the   |
|                                       | number of its document; queries and keys are one sequence  |
| bool or float `(batch, 1, q, k)`      | a full matrix: packed sequences or a mask that the user    |
|                                       | made; it already holds causality                           |
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

ALL = slice(None)
# A bias of the scores that leaves a key no weight next to one without: -10,000 as bfloat16 rounds it, and below.
HIDES = -9_900.0


class Positions(Protocol):
    """What knows the positions of the keys that it returned: a cache layer of `cache.py`."""

    max_length: int | None

    def positions(self, kv_length: int, device: torch.device) -> Tensor:
        """`(kv_length,)` positions of the keys returned last."""

    def query_positions(self, q_length: int, device: torch.device) -> Tensor:
        """`(q_length,)` positions of the new tokens."""


@dataclass(frozen=True)
class Mask:
    """Which keys each query may see. Shapes: B may be 1 where all rows of the batch agree.

    Attributes:
        query_position: `(B, Q)`, integer; consecutive along Q, and equal in all rows, unless `dense` is set.
        key_position: `(B, K)`, integer, consecutive along K, equal in all rows.
        is_causal: hide keys whose position is after the query's.
        key_visible: `(B, K)` bool, False for padding; `None` when every key is real.
        dense: `(B, 1 or H, Q, K)` bool, True = may attend; complete, so causality is not added.
        bias: `(B, 1 or H, Q, K)` float, added to the scaled scores.
        window: hide keys `window` or more positions away: the model's own window.
        document: `(B, K)`, integer: hide keys of other documents than the query's (packed rows). Queries and keys are
            the same tokens then.
        known_offset: `offset()` where it follows from the shapes, so that nothing waits for the device.
        softcap: bound of the scaled scores, before a bias: s becomes softcap * tanh(s / softcap) (Gemma 2).
        sinks: `(H,)`, for each query head the score of one more key that all of its queries see, and that has no value
            (gpt-oss).
    """

    query_position: Tensor
    key_position: Tensor
    is_causal: bool
    key_visible: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    window: int | None = None
    known_offset: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    document: Tensor | None = None

    @classmethod
    def aligned(
        cls,
        q_length: int,
        kv_length: int,
        *,
        is_causal: bool,
        key_visible: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Mask:
        """A mask whose last query is at the last key, as in a decode step with a cache."""
        queries = torch.arange(kv_length - q_length, kv_length, device=device)[None]
        keys = torch.arange(kv_length, device=device)[None]
        return cls(queries, keys, is_causal, key_visible, known_offset=kv_length - q_length)

    @classmethod
    def receive(
        cls,
        attention_mask: Tensor | None,
        q_length: int,
        kv_length: int,
        *,
        is_causal: bool,
        device: torch.device,
        cache: Positions | None = None,
        window: int | None = None,
    ) -> Mask:
        """Read the tensor that came through a model's forward; see the table above.

        Args:
            cache: the layer that returned the keys, if it is one of ours; it knows their positions.
            window: the `sliding_window` of the attention call; counts if the tensor says so. Layers that pass none
                (Phi-3.5-MoE) take the tensor's, which waits for the device.

        Raises:
            ValueError: when its size fits neither the queries nor the keys; for packed rows with a cache.
        """
        if attention_mask is not None and attention_mask.dtype == torch.long and attention_mask.shape[2] == 2:
            return cls._receive_documents(attention_mask, q_length, kv_length, is_causal, cache)
        if attention_mask is None or attention_mask.dtype != torch.long or attention_mask.shape[1] == 1:
            window = None
        elif window is None:
            window = int(attention_mask[0, 1, 0, 0])
        if cache is not None and (attention_mask is None or attention_mask.dtype == torch.long):
            return cls._receive_cached(attention_mask, q_length, kv_length, is_causal, device, cache, window)
        if attention_mask is None:
            # A single query at the last key has no future to hide.
            return cls.aligned(q_length, kv_length, is_causal=is_causal and q_length > 1, device=device)
        if attention_mask.is_floating_point() or attention_mask.dtype == torch.bool:
            if cache is not None:
                return cls._receive_cached_matrix(attention_mask, q_length, kv_length, is_causal, cache)
            return cls._receive_matrix(attention_mask, q_length, kv_length, is_causal)
        positions = attention_mask[:, 0, 0, :]
        keys, queries = positions[:, :-q_length], positions[:, -q_length:]
        if keys.shape[1] < kv_length or attention_mask.shape[2] != 1:
            raise ValueError(
                f"the attention mask has shape {tuple(attention_mask.shape)} and describes {keys.shape[1]} keys, "
                f"but the layer has {kv_length}; the mask of another forward pass must not be reused"
            )
        # One mask serves all layers; a layer whose cache keeps only a window holds the last keys.
        keys = keys[:, -kv_length:]
        hidden = keys < 0
        # As many keys as queries are the same tokens; with a cache only the positions tell.
        offset = 0 if q_length == kv_length else None
        return cls(queries, torch.where(hidden, ~keys, keys), is_causal, ~hidden, window=window, known_offset=offset)

    @classmethod
    def _receive_documents(
        cls, attention_mask: Tensor, q_length: int, kv_length: int, is_causal: bool, cache: Positions | None
    ) -> Mask:
        if cache is not None or not 2 * q_length == 2 * kv_length == attention_mask.shape[3]:
            raise ValueError(
                f"the attention mask has shape {tuple(attention_mask.shape)} and describes packed rows of "
                f"{attention_mask.shape[3] // 2} tokens, but the layer has {q_length} queries, {kv_length} keys and "
                f"{'no' if cache is None else 'a'} cache; packed rows are one pass without a cache: use_cache=False"
            )
        mask = cls.aligned(q_length, kv_length, is_causal=is_causal, device=attention_mask.device)
        return dataclasses.replace(mask, document=attention_mask[:, 0, 1, :kv_length])

    @classmethod
    def _receive_cached(
        cls,
        attention_mask: Tensor | None,
        q_length: int,
        kv_length: int,
        is_causal: bool,
        device: torch.device,
        cache: Positions,
        window: int | None,
    ) -> Mask:
        keys = cache.positions(kv_length, device)
        queries = cache.query_positions(q_length, device)[None]
        if attention_mask is None:
            # No padding, and the layer keeps no slot without a token: one query sees all of its keys.
            visible = None if cache.max_length is None else (keys >= 0)[None]
        else:
            described = attention_mask[:, 0, 0, :-q_length]
            start = described[0, 0] ^ (described[0, 0] >> 63)  # the position, also of a hidden key
            inside = (keys - start).clamp(0, described.shape[1] - 1)
            visible = (described[:, inside] >= 0) & (keys >= 0)
        return cls(queries, keys[None], is_causal, visible, window=window, known_offset=kv_length - q_length)

    @classmethod
    def _receive_cached_matrix(
        cls, matrix: Tensor, q_length: int, kv_length: int, is_causal: bool, cache: Positions
    ) -> Mask:
        """Columns are of all tokens, or in a static cache of all places: those of the keys handed out are taken."""
        keys, queries = cache.positions(kv_length, matrix.device), cache.query_positions(q_length, matrix.device)
        length = matrix.shape[-1]
        # In a cache that grows the last column is the last new token's.
        columns = keys if cache.max_length is not None else keys - keys[-1] + (length - 1)
        if matrix.shape[-2] not in (1, q_length) or length < (cache.max_length or kv_length):
            raise ValueError(
                f"the attention mask has shape {tuple(matrix.shape)} but the layer has {q_length} queries and a cache "
                f"of {cache.max_length or kv_length} tokens; its last two sizes must be those"
            )
        visible, bias = _split(matrix)
        inside = (columns >= 0) & (columns < length)
        columns = columns.clamp(0, length - 1)
        visible = visible[..., columns] & inside
        bias = None if bias is None else bias[..., columns]
        return cls(queries[None], keys[None], is_causal, None, visible, bias)

    @classmethod
    def _receive_matrix(cls, matrix: Tensor, q_length: int, kv_length: int, is_causal: bool) -> Mask:
        visible, bias = _split(matrix)
        if visible.shape[-2] not in (1, q_length) or visible.shape[-1] < kv_length:
            raise ValueError(
                f"the attention mask has shape {tuple(matrix.shape)} but the layer has {q_length} queries and "
                f"{kv_length} keys; its last two sizes must be those"
            )
        wider = visible.shape[-1] > kv_length and is_causal and not is_tracing(matrix)
        # The last columns are those of the keys, unless they are places of a static cache, or dropped keys count.
        if wider and (not bool(visible[..., -1, -1].any()) or bool(visible[..., :-kv_length].any())):
            raise ValueError(
                f"the attention mask has shape {tuple(matrix.shape)} and shows other keys than the last {kv_length}, "
                "which are all that the layer's cache keeps, the model's own window; pass a 2-D attention_mask, or "
                "use_cache=False"
            )
        visible = visible[..., -kv_length:]
        bias = None if bias is None else bias[..., -kv_length:]
        mask = cls.aligned(q_length, kv_length, is_causal=is_causal, device=matrix.device)
        queries = mask.query_position
        if is_causal and q_length != kv_length:
            # With a cache the queries need not be at its end (StaticCache); in a causal mask
            # the last key that a query sees is its own.
            last = kv_length - 1 - visible.flip(-1).int().argmax(-1)
            queries = last[:, 0].expand(-1, q_length)
        return cls(queries, mask.key_position, is_causal, None, visible, bias)

    @property
    def is_trivial(self) -> bool:
        """Nothing is hidden but the future, and queries and keys are the same tokens (if causal)."""
        whole = not self.is_causal or self.query_position.shape[1] == self.key_position.shape[1]
        parts = (self.key_visible, self.dense, self.bias, self.window, self.document)
        return whole and all(part is None for part in parts)

    def distance(self, queries: slice = ALL, keys: slice = ALL) -> Tensor:
        """Query position minus key position, `(B, 1, q, k)`; positive for keys of the past."""
        return self.query_position[:, None, queries, None] - self.key_position[:, None, None, keys]

    def visible(self, queries: slice = ALL, keys: slice = ALL) -> Tensor | None:
        """Bool `(B, 1 or H, q, k)` for a block of queries and keys, or `None` if nothing is hidden."""
        if self.dense is not None:
            return self.dense[..., queries if self.dense.shape[-2] > 1 else ALL, keys]
        visible = None if self.key_visible is None else self.key_visible[:, None, None, keys]
        # A single query at the last key has no future to hide.
        if self.is_causal and not (self.known_offset is not None and self.query_position.shape[1] == 1):
            past = self.distance(queries, keys) >= 0
            visible = past if visible is None else visible & past
        if self.window is not None:
            near = self.distance(queries, keys).abs() < self.window
            visible = near if visible is None else visible & near
        if self.document is not None:
            same = self.document[:, None, queries, None] == self.document[:, None, None, keys]
            visible = same if visible is None else visible & same
        return visible

    def first_token(self) -> Tensor:
        """Position of the first key that is no padding, `(B or 1, 1)`: with left padding it is not 0.

        The position after the last key where a row has nothing but padding.

        Raises:
            ValueError: for a full matrix of a step with a cache, which cannot tell.
        """
        seen = self.key_visible
        if self.dense is not None:
            if self.query_position.shape[1] != self.key_position.shape[1]:
                raise ValueError(
                    "the first token cannot be told from padding by a full attention matrix with a cache; it needs the "
                    "model's own 2-D mask: set config.sliding_window to None, or pass a 2-D attention_mask"
                )
            seen = self.dense.any(-2)[:, 0]
        if seen is None:
            return self.key_position[:, :1]
        after = self.key_position.amax(-1, keepdim=True) + 1
        return torch.where(seen, self.key_position, after).amin(-1, keepdim=True)

    def first_tokens(self) -> Tensor:
        """For each key the position of the first real token of its document, `(B or 1, K)`.

        A row is one document, unless a full matrix keeps parts of it apart (packed sequences): a document then begins
        at each token before which no query sees from one side to the other.

        Raises:
            ValueError: as `first_token`.
        """
        first = self.first_token()
        if self.dense is None:
            return first.expand(-1, self.key_position.shape[1])
        length = self.key_position.shape[1]
        seen = self.dense.any(1).expand(-1, length, -1)  # (B, Q, K), Q = K
        own = torch.arange(length, device=seen.device)
        some = seen.any(-1)
        begin = torch.where(some, seen.int().argmax(-1), own).minimum(own)
        end = torch.where(some, length - 1 - seen.flip(-1).int().argmax(-1), own).maximum(own)
        # Query i joins the tokens from `begin` to `end`: so many queries join a token to the one before it.
        spans = seen.new_zeros(len(seen), length + 1, dtype=torch.long)
        ones = torch.ones_like(begin)
        spans = spans.scatter_add(1, begin + 1, ones).scatter_add(1, end + 1, -ones)
        document = (spans.cumsum(-1)[:, :-1] == 0).cumsum(-1) - 1
        position = self.key_position.expand(len(seen), -1)
        real = torch.where(seen.any(-2), position, position.amax() + 1)
        firsts = real.new_full(real.shape, int(torch.iinfo(real.dtype).max))
        return firsts.scatter_reduce(1, document, real, "amin").gather(1, document)

    def offset(self) -> int:
        """Position of the first query minus that of the first key."""
        return (
            self.known_offset
            if self.known_offset is not None
            else int(self.query_position[0, 0] - self.key_position[0, 0])
        )

    def also(self, allowed: Tensor) -> Mask:
        """This mask and the bool matrix `allowed` `(B, 1 or H, Q, K)`, both."""
        visible = self.visible()
        dense = allowed if visible is None else allowed & visible
        return dataclasses.replace(self, dense=dense, document=None)

    def as_matrix(self) -> Mask:
        """The same with the model's own window, and documents, inside `dense`."""
        if self.window is None and self.document is None:
            return self
        return dataclasses.replace(
            self, dense=self.visible(), key_visible=None, window=None, document=None, known_offset=None
        )  # fmt: skip

    def within(self, window: int) -> Mask:
        """This mask and a window: in `window`, or in the matrix where the mask is one."""
        if self.dense is None:
            return dataclasses.replace(self, window=min(window, self.window or window))
        return self.as_matrix().also(self.distance().abs() < window)

    def narrow(self, window: int | None) -> tuple[Mask, int | None]:
        """The mask without the model's own window, and the smaller of both windows."""
        if self.window is None:
            return self, window
        return dataclasses.replace(self, window=None), min(window or self.window, self.window)

    def capped(self, scores: Tensor) -> Tensor:
        """The scaled scores within `softcap`."""
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax over the last axis of scaled scores `(B, H, Q, K)`, in float32 or better.

        A query that sees no key gets all zeros (as PyTorch's SDPA with a bool mask), not NaN. What a sink takes is
        missing from a query's sum.
        """
        dtype = scores.dtype
        scores = self.capped(scores.float() if dtype in (torch.float16, torch.bfloat16) else scores)
        if self.bias is not None:
            scores = scores + self.bias
        visible = self.visible()
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        if self.sinks is None:
            weights = scores.softmax(-1)
        else:
            column = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        return (weights if visible is None else weights.masked_fill(~visible, 0.0)).to(dtype)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a matrix hides, and its bias; a bool matrix, True = may attend, has none."""
    if matrix.dtype == torch.bool:
        return matrix, None
    # Half of the dtype's minimum separates "masked" from a real bias, however it was made.
    visible = matrix > torch.finfo(matrix.dtype).min / 2
    # Numbers such as -10,000 (MarkupLM, masks of users) hide a key as well, where the row shows another one.
    shown = matrix > HIDES
    visible = visible & (shown | ~shown.any(-1, keepdim=True))
    return visible, matrix.masked_fill(~visible, 0.0)
