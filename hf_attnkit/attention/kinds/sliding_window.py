"""Sliding-window attention (Beltagy et al. 2020; Mistral 7B, Jiang et al. 2023), cost n * window.

A window of W keeps W keys on each side of a query, the query's own key counted:

    causal, W = 3          bidirectional, W = 3        causal, W = 2, 1 sink
    0 x                    0 x x x                     0 x
    1 x x                  1 x x x x                   1 x x
    2 x x x                2 x x x x x                 2 s x x
    3   x x x              3   x x x x                 3 s   x x
    4     x x x            4     x x x                 4 s     x x

What lies outside the window is never computed, forward or backward. Attention sinks (Xiao et al.
2023, arXiv 2309.17453) are the first tokens of a sequence, which every later query sees as well;
they keep their own positions, or with `renumber` those of the cache, as in the paper: the query is never further from
them than the cache is long, so that a text may be longer than any that the model was trained on.

    1 sink, W = 2            renumber=False         renumber=True
    query 2 is at            s 0   x 1 2            s 0   x 1 2
          3                  s 0   x 2 3            s 0   x 1 2
          4                  s 0   x 3 4            s 0   x 1 2

A rotary embedding knows differences of positions only, and within the window these are the same in both. So no cached
key is rotated again: the sinks meet the query where it is in the cache, the window where it is in the text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.eight_bits import check_cache_dtype
from hf_attnkit.attention.kernels import backends, packed, renumbered, tiled
from hf_attnkit.attention.kernels.global_tokens import dense_with_extra, first_keys
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.window_cache import WindowLayer, window_layer
from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store


@dataclass(frozen=True)
class SlidingWindowAttention(Kind):
    """A window longer than the sequence is full attention. A full matrix is quadratic, so it takes the dense path.

    Attributes:
        window: number of keys that a query sees on each side, its own included.
        num_sink_tokens: how many of the first tokens (after left padding) every query sees.
        backend: which kernel computes it, see `backends`.
        cache_dtype: of the cache's keys and values, "int8" or "float8_e4m3fn"; `None` for the model's own.
        renumber: positions count within the cache, which needs a causal model with a rotary position embedding.
    """

    name = "sliding_window"
    own_window = True
    self_attention_only = True

    window: int
    num_sink_tokens: int = 0
    backend: str = "auto"
    cache_dtype: str | None = None
    renumber: bool = False

    def __post_init__(self) -> None:
        store(
            self,
            window=integer(self.window, "window", minimum=1, why="the number of keys, the own one included"),
            num_sink_tokens=integer(self.num_sink_tokens, "num_sink_tokens", minimum=0),
        )
        check_cache_dtype(self.cache_dtype)
        backends.check_backend(self.backend)
        if self.num_sink_tokens and self.backend not in ("auto", "tiled"):
            raise ValueError(
                f"backend={self.backend!r} has no attention sinks; use backend='tiled' or num_sink_tokens=0"
            )
        backends.check_backend(self.backend, self.window)
        if not isinstance(self.renumber, bool):
            raise ValueError(f"renumber={self.renumber!r} must be True or False")
        if self.renumber and not self.num_sink_tokens:
            raise ValueError(
                "renumber=True moves the query towards the sinks, and there are none with num_sink_tokens=0: within a "
                "window distances are the same in both ways of counting; give num_sink_tokens=4, or renumber=False"
            )

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        """A matrix where there are sinks, or was one. Each document of a packed row has sinks of its own."""
        if not self.num_sink_tokens:
            return super().seen(mask, shape, call)
        first = mask.first_tokens()
        is_sink = (mask.key_position >= first) & (mask.key_position < first + self.num_sink_tokens)
        return mask.as_matrix().also((mask.distance().abs() < self.window) | is_sink[:, None, None, :])

    def create_cache(self, max_length: int | None) -> SequenceLayer:
        """It keeps `num_sink_tokens + window - 1` tokens."""
        return window_layer(max_length, self.window, self.num_sink_tokens, self.cache_dtype)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        scaling: float,
        dropout: float = 0.0,
        call: Call = NO_CALL,
    ) -> tuple[Tensor, None]:
        common: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "window": self.window}
        if not self.num_sink_tokens:
            mask, common["window"] = mask.narrow(self.window)
            return backends.attend(query, key, value, mask, backend=self.backend, **common), None
        mask = mask.as_matrix()
        turned = self._turned(query, mask, call) if self.renumber else None
        if mask.dense is not None and (call.cache is None or call.cache.num_sinks == 0):
            pattern = self.seen(mask, key.shape, call)
            if turned is not None:
                return self._twice(query, turned, key, value, pattern, scaling=scaling, dropout=dropout), None
            return packed.attention(query, key, value, pattern, scaling=scaling, dropout=dropout)
        if self._sees_all(query, mask, call.cache):
            whole = Mask.aligned(1, key.shape[2], is_causal=False, device=query.device)
            if turned is not None and call.cache is not None:
                first: dict[str, Any] = {"turned": turned, "num_turned": call.cache.num_sinks}
                return packed.attention(query, key, value, whole, scaling=scaling, dropout=dropout, **first)
            return backends.attend(query, key, value, whole, scaling=scaling, dropout=dropout), None
        sinks, key, value = first_keys(key, value, mask, self.num_sink_tokens, call.cache)
        matrix = mask.dense is not None or mask.bias is not None
        if matrix or query.shape[2] == 1 or key.shape[2] <= 2 * self.window:
            return dense_with_extra(query, key, value, mask, sinks, turned=turned, **common), None
        if turned is not None:
            return renumbered.attend(query, turned, key, value, mask, sinks, **common), None
        return tiled.attend(query, key, value, mask, extra=sinks, **common)[0], None

    def of_any_length(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, call: Call = NO_CALL
    ) -> Tensor:
        """As `Kind.of_any_length`."""
        if not self.renumber:
            return super().of_any_length(query, key, value, mask, scaling=scaling, call=call)
        pattern = self.seen(mask.as_matrix(), key.shape, call)
        return self._twice(query, self._turned(query, pattern, call), key, value, pattern, scaling=scaling)

    def _twice(self, query: Tensor, turned: Tensor, key: Tensor, value: Tensor, seen: Mask, **common: float) -> Tensor:
        """All keys as sinks and again as the window: a query sees each in one of the two."""
        near = seen.distance().abs() < self.window
        allowed = seen.as_matrix().visible()
        assert allowed is not None  # a window hides something, or the matrix says that it does not
        whole = dataclasses.replace(
            seen, dense=torch.cat([allowed & ~near, allowed & near], -1), key_visible=None, window=None,
            bias=None if seen.bias is None else torch.cat([seen.bias] * 2, -1),
        )  # fmt: skip
        key, value = (torch.cat([states, states], 2) for states in (key, value))
        number = key.shape[2] // 2
        return packed.attention(query, key, value, whole, turned=turned, num_turned=number, **common)[0]

    def _turned(self, query: Tensor, mask: Mask, call: Call) -> Tensor:
        """The queries where they are in a cache of sinks and window, `num_sink_tokens + window` tokens at most."""
        if call.rotation is None:
            raise ValueError("renumber=True needs the rotation of queries and keys, which swap_attention finds")
        if call.cache is not None and call.cache.sink_position is not None:
            first = call.cache.sink_position[:, :1]
        elif mask.dense is not None and mask.query_position.shape[1] == mask.key_position.shape[1]:
            first = mask.first_tokens()  # of each query's document
        else:
            first = mask.first_token()
        place = mask.query_position - first
        return call.rotation.back(query, (place - (self.num_sink_tokens + self.window - 1)).clamp(min=0))

    def _sees_all(self, query: Tensor, mask: Mask, cache: SequenceLayer | None) -> bool:
        """Whether this is a step whose one query sees all keys that the cache returned: sinks, window and itself."""
        return (
            query.shape[2] == 1
            and isinstance(cache, WindowLayer)
            and mask.key_visible is None and mask.dense is None and mask.bias is None and mask.window is None
            and cache.num_sinks > 0
            and int(cache.seen) - self.window >= cache.num_sinks  # no sink is inside the window too
        )  # fmt: skip
