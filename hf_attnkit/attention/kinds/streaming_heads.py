"""Retrieval and streaming heads (DuoAttention, Xiao et al. 2024, arXiv 2410.10819): a pattern for each key/value head.

A retrieval head sees everything. A streaming head sees the first tokens and a window, as `sliding_window` with sinks:

    retrieval head      streaming head, window 2, 1 sink
    0 x                 0 x
    1 x x               1 x x
    2 x x x             2 s x x
    3 x x x x           3 s   x x
    4 x x x x x         4 s     x x

Each sort runs in the kernel that it has as a kind of its own, on its heads alone. The cache keeps all tokens for the
retrieval heads and `num_sink_tokens + window - 1` for the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.eight_bits import check_cache_dtype
from hf_attnkit.attention.growing_cache import full_layer
from hf_attnkit.attention.heads_cache import HeadsLayer, divided
from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.window_cache import window_layer
from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store


@dataclass(frozen=True)
class StreamingHeadsAttention(Kind):
    """Some heads of a layer; where all of them stream, the layer's kind is `sliding_window`.

    Attributes:
        heads: the key/value heads that stream, with the query heads that share them.
        window: number of keys that these see on each side of a query, its own included.
        num_sink_tokens: how many of the first tokens (after left padding) they see as well.
        cache_dtype: of the cache's keys and values, "int8" or "float8_e4m3fn"; `None` for the model's own.
    """

    name = "streaming_heads"
    own_window = True
    self_attention_only = True
    names_heads = True

    heads: tuple[int, ...]
    window: int
    num_sink_tokens: int = 4
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.heads, str) or not isinstance(self.heads, Iterable):
            raise ValueError(f"heads={self.heads!r} must be a list of key/value heads, for example heads=[0, 2]")
        check_cache_dtype(self.cache_dtype)
        heads = [integer(head, "heads", minimum=0, why="the number of a key/value head") for head in self.heads]
        if not heads:
            raise ValueError("heads=[] names no head that streams; a layer whose heads all see everything runs 'flash'")
        if len(set(heads)) < len(heads):
            twice = next(head for head in heads if heads.count(head) > 1)
            raise ValueError(f"heads={list(heads)} names head {twice} twice; name each once")
        store(
            self,
            heads=tuple(sorted(heads)),
            window=integer(self.window, "window", minimum=1, why="the number of keys, the own one included"),
            num_sink_tokens=integer(self.num_sink_tokens, "num_sink_tokens", minimum=0),
        )

    def check_heads(self, num_heads: int, num_key_value_heads: int) -> None:
        if self.heads[-1] >= num_key_value_heads:
            raise ValueError(
                f"heads={list(self.heads)} names head {self.heads[-1]}, and the layer has {num_key_value_heads} "
                f"key/value heads: 0 to {num_key_value_heads - 1}"
            )
        if len(self.heads) == num_key_value_heads:
            raise ValueError(
                f"heads={list(self.heads)} are all heads of the layer; for a layer whose heads all stream use "
                f"'sliding_window' with window={self.window} and num_sink_tokens={self.num_sink_tokens}"
            )

    @property
    def streaming(self) -> SlidingWindowAttention:
        """What the streaming heads run."""
        return SlidingWindowAttention(self.window, self.num_sink_tokens)

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        """A matrix for each query head."""
        number = shape[1]
        group = (call.num_heads or number) // number
        streams = torch.tensor([head in self.heads for head in range(number)], device=mask.key_position.device)
        mask = mask.as_matrix()
        near = self.streaming.seen(mask, shape, call).as_matrix().visible()
        assert near is not None  # a window and causality hide something, or the matrix says that they do not
        return mask.also(near | ~streams.repeat_interleave(group)[None, :, None, None])

    def create_cache(self, max_length: int | None) -> SequenceLayer:
        """All tokens of the retrieval heads; `num_sink_tokens + window - 1` of the others."""
        near = window_layer(max_length, self.window, self.num_sink_tokens, self.cache_dtype)
        return HeadsLayer(self.heads, full_layer(max_length, self.cache_dtype), near)

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
        """Attend, as `Kind.attention`. After the first tokens of a cache, `key` and `value` are of retrieval heads."""
        cache = call.cache if isinstance(call.cache, HeadsLayer) and not call.cache.is_first else None
        number = key.shape[1] if cache is None else key.shape[1] + len(self.heads)
        far, near, order = divided(self.heads, number, query.device) if cache is None else cache.division
        near_call, near_mask = NO_CALL, mask
        if cache is None:
            near_key, near_value = key[:, near], value[:, near]
            key, value = key[:, far], value[:, far]
        else:
            near_call, near_mask = Call(cache.near), cache.near_mask(mask)
            near_key, near_value = cache.near_keys, cache.near_values
        groups = query.unflatten(1, (number, -1))
        far_mask, window = of_heads(mask, far, number).narrow(None)
        far_output = backends.attend(
            groups[:, far].flatten(1, 2), key, value, far_mask, scaling=scaling, dropout=dropout, window=window
        )
        near_output, _ = self.streaming.attention(
            groups[:, near].flatten(1, 2), near_key, near_value, of_heads(near_mask, near, number),
            scaling=scaling, dropout=dropout, call=near_call,
        )  # fmt: skip
        outputs = torch.cat([far_output, near_output], dim=1).unflatten(1, (number, -1))
        return outputs[:, order].flatten(1, 2), None


def of_heads(mask: Mask, heads: Tensor, number: int) -> Mask:
    """The mask of the query heads that share these of `number` key/value heads."""
    parts = {
        name: part.unflatten(1, (number, -1))[:, heads].flatten(1, 2)
        for name in ("dense", "bias")
        if (part := getattr(mask, name)) is not None and part.shape[1] > 1
    }
    return replace(mask, **parts)
