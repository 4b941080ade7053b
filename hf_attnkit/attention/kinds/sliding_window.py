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
they keep their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.eight_bits import check_cache_dtype
from hf_attnkit.attention.kernels import backends, packed, tiled
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
    """

    name = "sliding_window"
    own_window = True
    self_attention_only = True

    window: int
    num_sink_tokens: int = 0
    backend: str = "auto"
    cache_dtype: str | None = None

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
        if mask.dense is not None and (call.cache is None or call.cache.num_sinks == 0):
            pattern = self.seen(mask, key.shape, call)
            return packed.attention(query, key, value, pattern, scaling=scaling, dropout=dropout)
        if self._sees_all(query, mask, call.cache):
            whole = Mask.aligned(1, key.shape[2], is_causal=False, device=query.device)
            return backends.attend(query, key, value, whole, scaling=scaling, dropout=dropout), None
        sinks, key, value = first_keys(key, value, mask, self.num_sink_tokens, call.cache)
        matrix = mask.dense is not None or mask.bias is not None
        if matrix or query.shape[2] == 1 or key.shape[2] <= 2 * self.window:
            return dense_with_extra(query, key, value, mask, sinks, **common), None
        return tiled.attend(query, key, value, mask, extra=sinks, **common)[0], None

    def _sees_all(self, query: Tensor, mask: Mask, cache: SequenceLayer | None) -> bool:
        """Whether this is a step whose one query sees all keys that the cache returned: sinks, window and itself."""
        return (
            query.shape[2] == 1
            and isinstance(cache, WindowLayer)
            and mask.key_visible is None and mask.dense is None and mask.bias is None and mask.window is None
            and cache.num_sinks > 0
            and int(cache.seen) - self.window >= cache.num_sinks  # no sink is inside the window too
        )  # fmt: skip
