"""Flash attention (Dao et al. 2022, arXiv 2205.14135): exact softmax attention without its matrix.

Memory is linear in the sequence length, forward and backward. The kernel is our own (`tiled.py`) or
the fastest one present that computes the same (`backends.py`): `backend="auto"` chooses, a backend
given by name runs or raises, and `hf_attnkit.attention_backends(model, **inputs)` tells the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.eight_bits import check_cache_dtype
from hf_attnkit.attention.growing_cache import full_layer
from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.window_cache import window_layer
from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store


@dataclass(frozen=True)
class FlashAttention(Kind):
    """Sums are in float32 or better.

    Attributes:
        window: number of keys on each side of a query, its own included; `None` for all keys.
        backend: which kernel computes it, see `backends`.
        cache_dtype: of the cache's keys and values, "int8" or "float8_e4m3fn"; `None` for the model's own.
    """

    name = "flash"
    own_window = True

    window: int | None = None
    backend: str = "auto"
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        check_cache_dtype(self.cache_dtype)
        if self.window is not None:
            store(self, window=integer(self.window, "window", minimum=1, why="the number of keys, or None for all"))
        backends.check_backend(self.backend, self.window)

    @property
    def self_attention_only(self) -> bool:
        return self.window is not None

    def create_cache(self, max_length: int | None) -> SequenceLayer | None:
        """A window keeps `window - 1` tokens; all of them in the model's own dtype are kept by Transformers' layer."""
        if self.window is not None:
            return window_layer(max_length, self.window, cache_dtype=self.cache_dtype)
        return None if self.cache_dtype is None else full_layer(max_length, self.cache_dtype)

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
        mask, window = mask.narrow(self.window)
        output = backends.attend(
            query, key, value, mask, scaling=scaling, dropout=dropout, window=window, backend=self.backend
        )
        return output, None
