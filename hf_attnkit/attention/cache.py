"""Cache layers for attention that does not need every past key: they live in Transformers' own caches.

Transformers makes a cache from the config, which cannot say what a swapped layer needs. So each
swapped module has a pre-hook (`cache_placement.py`) that puts the right layer into the cache before its first
token, whoever made the cache, and hands it on to the attention call. A layer belongs to the kind of attention that
it was made for: no other can use what it kept, so each call is announced, and one that is not raises.

    keys of a `WindowLayer`, window 3, 2 sinks, after 8 tokens and one step with token 8:

        [ 0 1 | 6 7 | 8 ]      copies of the sinks, the last window - 1 tokens, the new token

All layers report the mask sizes of the whole sequence, because Transformers makes one mask for all
of them; each takes the part that belongs to its keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_attnkit.attention.mask import Mask

ALL_TOKENS = 2**62  # a window that no text is longer than
CACHE_ARGUMENT = "hf_attnkit_cache"


def take(states: Tensor, index: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """`states[b, :, index[b, s]]` as `(B, H, S, D)`; where the index lies outside, `otherwise`'s entry."""
    length = states.shape[2]
    inside = (index >= 0) & (index < length)
    index = index.clamp(0, length - 1)[:, None, :, None]
    taken = states.gather(2, index.expand(states.shape[0], states.shape[1], -1, states.shape[3]))
    return taken if otherwise is None else torch.where(inside[:, None, :, None], taken, otherwise)


def _describe(kind: Any) -> str:
    return "attention" if kind is None else f"{kind.name!r} attention ({kind.options})"


class SequenceLayer(CacheLayerMixin):
    """A cache layer that counts the tokens it has seen and stores what its attention needs.

    `update` hands out what the new tokens may attend to; the attention call then says with `settle`
    that it is done, and the layer drops what no later token needs.

    Attributes:
        keys, values: `(B, num_key_value_heads, kept, head_dim)`; `None` before the first token.
        seen: tokens so far; a tensor in a static cache.
        max_length: that of a static cache, else `None`.
        owner: the kind of attention that it keeps keys for.
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

    def __init__(self, max_length: int | None) -> None:
        super().__init__()
        self.max_length = max_length
        self.owner: Any = None
        self.announced = False
        self.seen = 0
        self.sink_position = self.sink_visible = None

    @property
    def num_sinks(self) -> int:
        """How many of the keys handed out are copies of sinks, in front of the others."""
        return 0 if self.sink_position is None else self.sink_position.shape[1]

    def positions(self, kv_length: int, device: torch.device) -> Tensor:
        """`(kv_length,)` positions of the keys handed out last, without the sinks; the new tokens are the last."""
        return torch.arange(kv_length, device=device) + (self.seen - kv_length)

    def query_positions(self, q_length: int, device: torch.device) -> Tensor:
        """`(q_length,)` positions of the new tokens."""
        return torch.arange(q_length, device=device) + (self.seen - q_length)

    def _begin(self) -> None:
        """Tokens are about to be added: only by the kind that the layer belongs to."""
        if not self.announced:
            raise ValueError(
                f"this cache was filled by {_describe(self.owner)} of hf_attnkit, which does not keep what the "
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


class WindowLayer(SequenceLayer):
    """Keeps the last `window - 1` tokens and the first `num_sink_tokens` of each row."""

    def __init__(self, max_length: int | None, window: int, num_sink_tokens: int = 0) -> None:
        super().__init__(max_length)
        self.window, self.num_sink_tokens = window, num_sink_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._begin()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.seen += key_states.shape[2]
        return self.keys, self.values

    def settle(self, mask: Mask) -> None:
        tail = self.keys.shape[2] - self.num_sinks
        if tail <= self.window - 1:
            return
        sinks = self._sinks(mask, tail) if self.num_sink_tokens else None
        start = self.keys.shape[2] - (self.window - 1)
        kept = [states[:, :, start:] for states in (self.keys, self.values)]
        if sinks is not None:
            kept = [torch.cat(pair, dim=2) for pair in zip(sinks, kept, strict=True)]
        # A view would keep all of the prompt in memory.
        self.keys, self.values = (states.contiguous() if sinks is not None else states.clone() for states in kept)

    def _sinks(self, mask: Mask, tail: int) -> tuple[Tensor, Tensor]:
        """Copies of the sinks `(B, H, S, D)`, before tokens among the last `tail` are dropped."""
        begin, known = self.seen - tail, self.num_sinks
        if self.sink_position is None:
            batch, device = self.keys.shape[0], self.keys.device
            position = mask.first_token() + torch.arange(self.num_sink_tokens, device=device)
            self.sink_position = position.expand(batch, -1)
            self.sink_visible = torch.zeros_like(self.sink_position, dtype=torch.bool)
        index = self.sink_position - begin
        inside = (index >= 0) & (index < tail)  # a row with a short prompt gets its sinks later
        if mask.key_visible is not None:
            inside = inside & mask.key_visible.expand(len(index), -1).gather(1, index.clamp(0, tail - 1))
        assert self.sink_visible is not None
        self.sink_visible = self.sink_visible | inside
        copies = []
        for states in (self.keys, self.values):
            earlier = states[:, :, :known] if known else None
            copies.append(take(states[:, :, known:], index, earlier))
        return copies[0], copies[1]


class StaticWindowLayer(SequenceLayer):
    """The same in tensors of one size: position t lies in slot `num_sink_tokens + t % window`.

    A step overwrites the oldest token in place instead of moving all others, so that it can run in a
    compiled graph. Several new tokens at once are handed out in order behind the kept ones.
    """

    seen: Tensor
    is_compileable = True

    def __init__(self, max_length: int, window: int, num_sink_tokens: int = 0) -> None:
        super().__init__(max_length)
        self.window, self.num_sink_tokens = min(window, max_length), num_sink_tokens
        self.seen = torch.zeros((), dtype=torch.long)
        self._in_order = True  # whether the keys handed out last stand in order
        self._new: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.num_sink_tokens + self.window
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], slots, states.shape[3]) for states in (key_states, value_states)
        )
        self.seen = self.seen.to(self.device)
        for tensor in (self.keys, self.values, self.seen):
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._begin()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, sinks = key_states.shape[2], self.num_sink_tokens
        # The first tokens come in order too: which of them are sinks is known when they have attended.
        self._in_order = new > 1 or (sinks > 0 and self.sink_position is None)
        self._new = (key_states, value_states)
        handed = self.keys, self.values
        if self._in_order:
            past = min(int(self.seen), self.window - 1)
            slots = (torch.arange(past, device=self.device) + (self.seen - past)) % self.window + sinks
            slots = torch.cat([torch.arange(self.num_sinks, device=self.device), slots])
            handed = (
                torch.cat([self.keys[:, :, slots], key_states], dim=2),
                torch.cat([self.values[:, :, slots], value_states], dim=2),
            )
        self.seen.add_(new)
        count = min(new, self.window)
        slots = (torch.arange(count, device=self.device) + (self.seen - count)) % self.window + sinks
        self.keys.index_copy_(2, slots, key_states[:, :, new - count :])
        self.values.index_copy_(2, slots, value_states[:, :, new - count :])
        return handed

    def prepare(self, mask: Mask) -> None:
        super().prepare(mask)
        if self.sink_position is not None and not self._in_order:
            self._store_sinks(mask)

    def _store_sinks(self, mask: Mask) -> None:
        """Copy those of the new tokens that are sinks of their row."""
        assert self.sink_position is not None and self.sink_visible is not None
        count, front = self._new[0].shape[2], slice(0, self.num_sink_tokens)
        index = self.sink_position - (self.seen - count)
        for kept, states in zip((self.keys, self.values), self._new, strict=True):
            kept[:, :, front] = take(states, index, kept[:, :, front])
        inside = (index >= 0) & (index < count)
        if mask.key_visible is not None:
            new = slice(-count, None) if self._in_order else ((self.seen - 1) % self.window)[None]
            visible = mask.key_visible[:, new].expand(index.shape[0], -1)
            inside = inside & visible.gather(1, index.clamp(0, count - 1))
        self.sink_visible = self.sink_visible | inside

    def positions(self, kv_length: int, device: torch.device) -> Tensor:
        if self._in_order:
            return super().positions(kv_length, device)
        last = self.seen - 1
        # Slots that no token has reached yet get positions before the first one.
        return last - (last - torch.arange(kv_length, device=device)) % self.window

    def settle(self, mask: Mask) -> None:
        if self._in_order and self.num_sink_tokens:
            if self.sink_position is None:
                position = mask.first_token() + torch.arange(self.num_sink_tokens, device=self.device)
                self.sink_position = position.repeat(self.keys.shape[0] // position.shape[0], 1)
                self.sink_visible = torch.zeros_like(self.sink_position, dtype=torch.bool)
            self._store_sinks(mask)
        self._new = ()

    def reset(self) -> None:
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
            self.seen.zero_()
        self.sink_position = self.sink_visible = None


def window_layer(max_length: int | None, window: int, num_sink_tokens: int = 0) -> SequenceLayer:
    """A layer that keeps a window; static if the cache has a maximum length."""
    kind = WindowLayer if max_length is None else StaticWindowLayer
    return kind(max_length, window, num_sink_tokens)  # type: ignore[arg-type]


class StateLayer(WindowLayer):
    """A recurrent state of constant size, and the last `window - 1` tokens beside it.

    Attributes:
        sums: `(B, num_key_value_heads, features, head_dim + 1)` float32 or better, or `None` before
            the first token; see `linear`.
    """

    def __init__(self, max_length: int | None, window: int = 1) -> None:
        super().__init__(max_length, window)
        self.sums: Tensor | None = None

    def _per_row(self) -> tuple[str, ...]:
        return (*super()._per_row(), "sums")

    def reset(self) -> None:
        super().reset()
        self.sums = None

    def offload(self) -> None:
        super().offload()
        self.sums = None if self.sums is None else self.sums.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        super().prefetch()
        self.sums = None if self.sums is None else self.sums.to(self.device, non_blocking=True)
