"""Local and global attention (Longformer, Beltagy et al. 2020; BigBird, Zaheer et al. 2020), cost n * window.

A query sees a window, every global token, and optionally a few random blocks; a global token sees
every key and is seen by every query (symmetric, so long as causality allows):

    window 2, 1 global token            * global   x window
    0 * * * * * *
    1 * x x
    2 * x x x
    3 *   x x x
    4 *     x x x
    5 *       x x

Global tokens are the first `num_global_tokens` tokens (after left padding), or those that the user
marks by passing `global_attention_mask` `(batch, keys)` to `model(...)`, as with Transformers'
Longformer. Nothing outside the pattern is computed, forward or backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.kernels import block_sparse, packed
from hf_attnkit.attention.kernels.random_blocks import find_links, linked_keys
from hf_attnkit.attention.kind import NO_CALL, Call, Kind
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.window_cache import ALL_TOKENS, window_layer
from hf_attnkit.common.checks import integer
from hf_attnkit.common.options import store

MARKS = "global_attention_mask"


@dataclass(frozen=True)
class LocalGlobalAttention(Kind):
    """`model(..., global_attention_mask=...)`, `(batch, keys)`, nonzero = global, replaces `num_global_tokens`.

    Attributes:
        window: number of keys on each side of a query, its own included.
        num_global_tokens: how many of the first tokens (after left padding) are global.
        num_random_blocks: random blocks of keys for each block of queries.
        block_size: tokens in a random block.
        seed: chooses the random blocks; the same blocks in every layer that has the same seed.
    """

    name = "local_global"
    self_attention_only = True
    call_arguments = (MARKS,)

    window: int
    num_global_tokens: int = 1
    num_random_blocks: int = 0
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"window": 1, "num_global_tokens": 0, "num_random_blocks": 0, "block_size": 1, "seed": 0}
        store(self, **{name: integer(getattr(self, name), name, minimum=minimum) for name, minimum in least.items()})

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        """A matrix."""
        mask = mask.as_matrix()
        is_global = self._is_global(mask, call.arguments.get(MARKS), shape)
        return mask.also(self._allowed(mask, is_global, shape))

    def of_any_length(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, call: Call = NO_CALL
    ) -> Tensor:
        """As `Kind.of_any_length`; random blocks are drawn for each length by NumPy, which no graph holds."""
        if self.num_random_blocks:
            raise ValueError(
                f"{self} draws its random blocks in Python, for each length and padding, so no graph of any length "
                "holds them; swap to num_random_blocks=0"
            )
        return super().of_any_length(query, key, value, mask, scaling=scaling, call=call)

    def create_cache(self, max_length: int | None) -> SequenceLayer:
        """It keeps the global tokens and a window; all keys if random blocks may need any of them."""
        if self.num_random_blocks:
            return window_layer(max_length, ALL_TOKENS)
        return window_layer(max_length, self.window, self.num_global_tokens)

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
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `Kind.attention`; forms no weights.

        Raises:
            ValueError: for a `global_attention_mask` of another size, or together with a cache.
        """
        marks = call.arguments.get(MARKS)
        if marks is not None:
            _check_marks(marks, query, key, call.cache)
        elif mask.is_causal and self.num_random_blocks == 0:
            # A global query sees no more than the others here: all before it is global too.
            window = SlidingWindowAttention(self.window, self.num_global_tokens)
            return window.attention(query, key, value, mask, scaling=scaling, dropout=dropout, call=call)
        is_global, positions = self._global_tokens(mask, marks, key.shape)
        if mask.dense is not None or mask.bias is not None or query.shape[2] != key.shape[2]:
            mask = mask.also(self._allowed(mask, is_global, key.shape))
            return packed.attention(query, key, value, mask, scaling=scaling, dropout=dropout)
        links = find_links(mask, key.shape, *self._random_blocks) if self.num_random_blocks else None
        pattern = block_sparse.Pattern(self.window, is_global, positions, links)
        return block_sparse.attend(query, key, value, mask, pattern, scaling=scaling, dropout=dropout), None

    def _global_tokens(self, mask: Mask, marks: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """`(B, K)` bool, True = global, and `(B, G)` their indices.

        Rows with fewer global tokens repeat a token that is not global.
        """
        is_global = self._is_global(mask, marks, shape)
        count = min(self.num_global_tokens, shape[2]) if marks is None else int(marks.bool().sum(-1).max())
        order = is_global.int().argsort(dim=-1, descending=True, stable=True)
        return is_global, order[:, :count]

    def _is_global(self, mask: Mask, marks: Tensor | None, shape: torch.Size) -> Tensor:
        """`(B, K)` bool, True = global."""
        batch = shape[0]
        if marks is None:
            first, number = mask.first_tokens(), self.num_global_tokens
            position = mask.key_position.expand(first.shape[0], -1)
            is_global = ((position >= first) & (position < first + number)).expand(batch, -1)
        else:
            is_global = marks.bool().expand(batch, -1)
        if mask.key_visible is not None and mask.dense is None:
            is_global = is_global & mask.key_visible
        return is_global

    @property
    def _random_blocks(self) -> tuple[int, int, int]:
        return self.num_random_blocks, self.block_size, self.seed

    def _allowed(self, mask: Mask, is_global: Tensor, shape: torch.Size) -> Tensor:
        """The pattern as a matrix `(B, 1, Q, K)`: for a mask that is one, or with a cache that keeps all keys."""
        batch, kv_length = is_global.shape
        index = (mask.query_position - mask.key_position[:, :1]).expand(batch, -1)  # of each query among the keys
        inside = index.clamp(0, kv_length - 1)
        allowed = (mask.distance().abs() < self.window) | is_global[:, None, None, :]
        allowed = allowed | is_global.gather(1, inside)[:, None, :, None]
        return allowed | linked_keys(mask, shape, *self._random_blocks)[:, None] if self.num_random_blocks else allowed


def _check_marks(marks: Tensor, query: Tensor, key: Tensor, cache: SequenceLayer | None) -> None:
    dropped = cache is not None and int(cache.seen) != query.shape[2]
    if dropped or marks.shape[-1] != key.shape[2] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"global_attention_mask has shape {tuple(marks.shape)} for {query.shape[2]} queries and {key.shape[2]} "
            "keys; it marks each token of one whole pass, so with a cache use num_global_tokens instead"
        )
