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

from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer, window_layer
from hf_attnkit.attention.kernels import backends, packed, tiled
from hf_attnkit.attention.kernels.global_tokens import dense_with_extra, first_keys
from hf_attnkit.attention.mask import Mask

OWN_WINDOW = SELF_ATTENTION_ONLY = True


def check(
    num_heads: int, num_key_value_heads: int, *, window: int, num_sink_tokens: int = 0, backend: str = "auto"
) -> None:
    """Raises `ValueError` for a window below 1, sinks below 0, or a backend that cannot run them."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(
            f"window={window!r} must be an integer of at least 1: the number of keys, the own one included"
        )
    if not isinstance(num_sink_tokens, int) or isinstance(num_sink_tokens, bool) or num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens={num_sink_tokens!r} must be an integer of at least 0")
    backends.check_backend(backend)
    if num_sink_tokens and backend not in ("auto", "tiled"):
        raise ValueError(f"backend={backend!r} has no attention sinks; use backend='tiled' or num_sink_tokens=0")
    if backend == "sdpa":
        raise ValueError("backend='sdpa' cannot skip what is outside a window; use 'auto', 'tiled' or 'flex'")


def create_cache(
    max_length: int | None, *, window: int, num_sink_tokens: int = 0, backend: str = "auto"
) -> SequenceLayer:
    """The cache layer of a causal model: it keeps `num_sink_tokens + window - 1` tokens."""
    return window_layer(max_length, window, num_sink_tokens)


def seen(mask: Mask, shape: torch.Size, *, window: int, num_sink_tokens: int = 0, backend: str = "auto") -> Mask:
    """The mask with the window and the sinks in it; a matrix where there are sinks, or was one.

    Each document of a packed row has sinks of its own.
    """
    if not num_sink_tokens:
        return mask.within(window)
    first = mask.first_tokens()
    is_sink = (mask.key_position >= first) & (mask.key_position < first + num_sink_tokens)
    return mask.as_matrix().also((mask.distance().abs() < window) | is_sink[:, None, None, :])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int,
    num_sink_tokens: int = 0,
    backend: str = "auto",
    cache: SequenceLayer | None = None,
) -> tuple[Tensor, None]:
    """Attend within the window.

    Shapes as in `mha.attention`; returns no weights. A window longer than the sequence is full
    attention. A `mask.dense` matrix is already quadratic, so it takes the dense path.

    Args:
        window: number of keys that a query sees on each side, its own included.
        num_sink_tokens: how many of the first tokens (after left padding) every query sees.
        backend: see `backends`.
        cache: the layer that handed out `key` and `value`, if it was made by `create_cache`.
    """
    common: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "window": window}
    if not num_sink_tokens:
        mask, common["window"] = mask.narrow(window)
        return backends.attend(query, key, value, mask, backend=backend, **common), None
    mask = mask.as_matrix()
    if mask.dense is not None and (cache is None or cache.num_sinks == 0):
        pattern = seen(mask, key.shape, window=window, num_sink_tokens=num_sink_tokens)
        return packed.attention(query, key, value, pattern, scaling=scaling, dropout=dropout)
    sinks, key, value = first_keys(key, value, mask, num_sink_tokens, cache)
    matrix = mask.dense is not None or mask.bias is not None
    if matrix or query.shape[2] == 1 or key.shape[2] <= 2 * window:
        return dense_with_extra(query, key, value, mask, sinks, **common), None
    return tiled.attend(query, key, value, mask, extra=sinks, **common)[0], None
