"""Flash attention (Dao et al. 2022, arXiv 2205.14135): exact softmax attention without its matrix.

Memory is linear in the sequence length, forward and backward. The kernel is our own (`tiled.py`) or
the fastest one present that computes the same (`backends.py`): `backend="auto"` chooses, a backend
given by name runs or raises, and `hf_attnkit.attention_backends(model, inputs)` tells the choice.
"""

from __future__ import annotations

from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer, window_layer
from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.mask import Mask

OWN_WINDOW = True


def check(num_heads: int, num_key_value_heads: int, *, window: int | None = None, backend: str = "auto") -> None:
    """Raises `ValueError` for a window that is no integer of at least 1, or an unknown or missing backend."""
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window={window!r} must be None (all keys) or an integer of at least 1")
    backends.check_backend(backend)
    if backend == "sdpa" and window is not None:
        raise ValueError("backend='sdpa' cannot skip what is outside a window; use 'auto', 'tiled' or 'flex'")


def create_cache(max_length: int | None, *, window: int | None = None, backend: str = "auto") -> SequenceLayer | None:
    """The cache layer of a causal model: `window - 1` tokens, or Transformers' own for all of them."""
    return None if window is None else window_layer(max_length, window)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    backend: str = "auto",
    cache: SequenceLayer | None = None,
) -> tuple[Tensor, None]:
    """Attend. Shapes as in `mha.attention`; returns no weights; sums in float32 or better.

    Args:
        window: keys on each side of a query, its own included; all by default.
        backend: see `backends`.
        cache: the layer that handed out `key` and `value`, if it was made by `create_cache`.
    """
    mask, window = mask.narrow(window)
    return backends.attend(
        query, key, value, mask, scaling=scaling, dropout=dropout, window=window, backend=backend
    ), None
