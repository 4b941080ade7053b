"""Cache layers of a window: they keep its tokens and the sinks, or next to it a state that does not grow.

keys of a `WindowLayer`, window 3, 2 sinks, after 8 tokens and one step with token 8:

    [ 0 1 | 6 7 | 8 ]      copies of the sinks, the last window - 1 tokens, the new token
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer, take
from hf_attnkit.attention.mask import Mask

ALL_TOKENS = 2**62  # a window that no text is longer than


class WindowLayer(SequenceLayer):
    """Keeps the last `window - 1` tokens and the first `num_sink_tokens` of each row."""

    def __init__(
        self, max_length: int | None, window: int, num_sink_tokens: int = 0, cache_dtype: str | None = None
    ) -> None:
        super().__init__(max_length, cache_dtype)
        self.window, self.num_sink_tokens = window, num_sink_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._stored(states[:, :, :0]) for states in (key_states, value_states))
        self.is_initialized = True

    def _add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
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
    compiled graph. Several new tokens at once are returned in order behind the kept ones.
    """

    seen: Tensor
    is_compileable = True

    def __init__(self, max_length: int, window: int, num_sink_tokens: int = 0, cache_dtype: str | None = None) -> None:
        super().__init__(max_length, cache_dtype)
        self.window, self.num_sink_tokens = min(window, max_length), num_sink_tokens
        self.seen = torch.zeros((), dtype=torch.long)
        self._in_order = True  # whether the keys returned last are in order
        self._new: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.num_sink_tokens + self.window
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], slots, states.shape[3])
            for states in (self._stored(key_states[:, :, :0]), self._stored(value_states[:, :, :0]))
        )
        self.seen = self.seen.to(self.device)
        for tensor in (self.keys, self.values, self.seen):
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
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

    def _find_sinks(self, mask: Mask) -> None:
        """In place: what a step makes anew, the next one's CUDA graph overwrites."""
        kept = self.sink_position
        super()._find_sinks(mask)
        assert kept is not None and self.sink_position is not None
        self.sink_position = kept.copy_(self.sink_position)

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
        self.sink_visible |= inside  # in place, as `_find_sinks`

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
                if not torch.compiler.is_compiling():
                    for tensor in (self.sink_position, self.sink_visible):
                        torch._dynamo.mark_static_address(tensor)
            self._store_sinks(mask)
        self._new = ()

    def reset(self) -> None:
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
            self.seen.zero_()
        self.sink_position = self.sink_visible = None


def window_layer(
    max_length: int | None, window: int, num_sink_tokens: int = 0, cache_dtype: str | None = None
) -> SequenceLayer:
    """A layer that keeps a window; static if the cache has a maximum length."""
    kind = WindowLayer if max_length is None else StaticWindowLayer
    return kind(max_length, window, num_sink_tokens, cache_dtype)  # type: ignore[arg-type]


class StateLayer(WindowLayer):
    """A recurrent state of constant size, and the last `window - 1` tokens next to it.

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
