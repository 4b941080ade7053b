"""Cache layers for attention that does not need every past key: they live in Transformers' own caches.

Transformers makes a cache from the config, which cannot say what a swapped layer needs. So each
swapped module has a pre-hook (`cache_placement.py`) that puts the right layer into the cache before its first
token, whoever made the cache, and passes it on to the attention call. A layer belongs to the kind of attention that
it was made for: no other can use what it kept, so each call is announced, and one that is not raises.

All layers report the mask sizes of the whole sequence, because Transformers makes one mask for all
of them; each takes the part that belongs to its keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_attnkit.attention.eight_bits import encode, is_encoded
from hf_attnkit.attention.mask import Mask

CACHE_ARGUMENT = "hf_attnkit_cache"


def take(states: Tensor, index: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """`states[b, :, index[b, s]]` as `(B, H, S, D)`; where the index lies outside, `otherwise`'s entry."""
    length = states.shape[2]
    inside = (index >= 0) & (index < length)
    index = index.clamp(0, length - 1)[:, None, :, None]
    taken = states.gather(2, index.expand(states.shape[0], states.shape[1], -1, states.shape[3]))
    return taken if otherwise is None else torch.where(inside[:, None, :, None], taken, otherwise)


class SequenceLayer(CacheLayerMixin):
    """A cache layer that counts the tokens it has seen and stores what its attention needs.

    `update` returns what the new tokens may attend to. After the attention call, `settle` drops what no later
    token needs.

    With `cache_dtype` all that is stored and returned is in 8 bits, the new tokens too, so that what a token attends to
    does not depend on how a text was cut into calls. Rounding has no gradient: a pass that takes one attends to what it
    was given.

    Attributes:
        keys, values: `(B, num_key_value_heads, kept, head_dim)`, or in 8 bits; `None` before the first token.
        cache_dtype: which 8 bits, see `eight_bits`; `None` for the model's own dtype.
        seen: tokens so far; a tensor in a static cache.
        max_length: that of a static cache, else `None`.
        owner: the kind of attention that it keeps keys for, as `Kind.cached_as` says.
        announced: whether a module of that kind is about to add tokens.
        sink_position: `(B, S)` positions of the first S entries of `keys`, `None` as long as there are none.
        sink_visible: `(B, S)` bool.
    """

    keys: Tensor
    values: Tensor
    seen: int | Tensor
    sink_position: Tensor | None
    sink_visible: Tensor | None

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, max_length: int | None, cache_dtype: str | None = None) -> None:
        super().__init__()
        self.max_length, self.cache_dtype = max_length, cache_dtype
        self.owner: Any = None
        self.announced = False
        self.seen = 0
        self.sink_position = self.sink_visible = None

    @property
    def num_sinks(self) -> int:
        """How many of the keys returned are copies of sinks, in front of the others."""
        return 0 if self.sink_position is None else self.sink_position.shape[1]

    @property
    def keeps_apart(self) -> bool:
        """Whether it holds keys that a mask of the keys returned says nothing about."""
        return self.num_sinks > 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens.

        Args:
            key_states, value_states: theirs, `(B, num_key_value_heads, new, head_dim)`.

        Returns:
            Keys and values of all tokens that these may attend to, the copies of sinks first.

        Raises:
            ValueError: for tokens of another attention; for a gradient through 8 bits.
        """
        self._begin()
        exact = self._takes_gradient(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handed = self._add(self._stored(key_states), self._stored(value_states))
        return (key_states, value_states) if exact else handed

    def _add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """`update`, of tokens in the form that is stored."""
        raise NotImplementedError(type(self).__name__)

    def _stored(self, states: Tensor) -> Tensor:
        return states if self.cache_dtype is None or is_encoded(states) else encode(states, self.cache_dtype)

    def _takes_gradient(self, *states: Tensor) -> bool:
        """Whether a gradient goes through 8 bits."""
        if self.cache_dtype is None or not torch.is_grad_enabled() or not any(each.requires_grad for each in states):
            return False
        if int(self.seen):
            raise ValueError(
                f"the cache holds {int(self.seen)} tokens as {self.cache_dtype!r}, through which no gradient goes; run "
                "under torch.no_grad(), or train with use_cache=False"
            )
        return True

    def positions(self, kv_length: int, device: torch.device) -> Tensor:
        """`(kv_length,)` positions of the keys returned last, without the sinks; the new tokens are the last."""
        return torch.arange(kv_length, device=device) + (self.seen - kv_length)

    def query_positions(self, q_length: int, device: torch.device) -> Tensor:
        """`(q_length,)` positions of the new tokens."""
        return torch.arange(q_length, device=device) + (self.seen - q_length)

    def _begin(self) -> None:
        """Tokens are about to be added: only by the kind that the layer belongs to."""
        if not self.announced:
            raise ValueError(
                f"this cache was filled by {self.owner or 'attention'} of hf_attnkit, which does not keep what the "
                "attention that runs now needs; start with a new cache"
            )
        self.announced = False

    def prepare(self, mask: Mask) -> None:
        """The new tokens are about to attend under this mask of the keys without the sinks.

        Raises:
            ValueError: for a full matrix, once sinks are copied: it cannot tell which of its columns are theirs.
        """
        if self.sink_position is None:
            return
        if mask.dense is not None:
            raise ValueError(
                "attention sinks and global tokens with a cache need the model's own 2-D mask, and this step has a "
                "full attention matrix: pass a 2-D attention_mask, set config.sliding_window to None, or "
                "use_cache=False"
            )
        self._find_sinks(mask)

    def settle(self, mask: Mask) -> None:
        """The new tokens have attended, under the same mask: keep what later ones need."""

    def _find_sinks(self, mask: Mask) -> None:
        """Rows that had nothing but padding so far may have got their first token."""
        found = mask.first_token() + torch.arange(self.num_sinks, device=mask.key_position.device)
        assert self.sink_position is not None and self.sink_visible is not None
        nothing = ~self.sink_visible.any(-1, keepdim=True)
        self.sink_position = torch.where(nothing, found, self.sink_position)

    def get_seq_length(self) -> Any:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_length or self.seen + query_length), 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return self.max_length or -1

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment] # as Transformers' own layers
        self.sink_position = self.sink_visible = None
        self.seen, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(
                f"{type(self).__name__} cannot give back {abs(tokens_to_remove)} tokens, because it does not keep all "
                "keys; assisted decoding needs an attention that does (hf_attnkit.restore_attention(model))"
            )

    def _per_row(self) -> tuple[str, ...]:
        """Names of the tensors with the batch on the first axis."""
        return ("keys", "values", "sink_position", "sink_visible")

    def _select(self, rows: Tensor) -> None:
        for name in self._per_row():
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name in self._per_row():
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.repeat_interleave(repeats, dim=0))
