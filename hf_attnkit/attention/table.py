"""The table of attention kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_attnkit.attention.kind import Kind
from hf_attnkit.attention.kinds.flash import FlashAttention
from hf_attnkit.attention.kinds.gqa import GroupedQueryAttention
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.kinds.local_global import LocalGlobalAttention
from hf_attnkit.attention.kinds.mha import MultiHeadAttention
from hf_attnkit.attention.kinds.mqa import MultiQueryAttention
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.kinds.streaming_heads import StreamingHeadsAttention
from hf_attnkit.common import options

_ALL: tuple[type[Kind], ...] = (
    MultiHeadAttention,
    GroupedQueryAttention,
    MultiQueryAttention,
    SlidingWindowAttention,
    StreamingHeadsAttention,
    LocalGlobalAttention,
    FlashAttention,
    LinearAttention,
)

KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in _ALL}
"""Name of a kind -> its class."""


def available_attentions() -> list[str]:
    """Names that `swap_attention` accepts."""
    return list(KINDS)


def make_kind(name: str, given: Mapping[str, Any]) -> Kind:
    """The kind with these options.

    Raises:
        ValueError: unknown name, unknown or missing option, or a value that the kind refuses.
    """
    if name not in KINDS:
        raise ValueError(f"unknown attention {name!r}; available: {', '.join(KINDS)}")
    return options.make(f"attention {name!r}", KINDS[name], given)
