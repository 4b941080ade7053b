"""A cache layer that keeps all tokens, in memory that grows by blocks: a step copies its own tokens and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.window_cache import ALL_TOKENS, window_layer

BLOCK = 256  # tokens: at most so many have memory and are not there yet


class GrowingLayer(SequenceLayer):
    """`keys` and `values` are views of the memory."""

    def __init__(self, cache_dtype: str | None = None) -> None:
        super().__init__(None, cache_dtype)
        self._memory: tuple[Tensor, ...] = ()
        self._shown: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._stored(states[:, :, :0]) for states in (key_states, value_states))
        self.is_initialized = True

    def _add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        start, self.seen = self.keys.shape[2], self.seen + key_states.shape[2]
        if torch.is_grad_enabled() and self.cache_dtype is None:  # what a backward pass needs must not be written over
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            return self.keys, self.values
        end = start + key_states.shape[2]
        if not self._has_room(end):
            self._memory = tuple(_larger(states, end) for states in (self.keys, self.values))
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        self._shown = self.keys
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._memory, self._shown = (), None

    def offload(self) -> None:
        super().offload()
        self._memory = ()

    def _has_room(self, end: int) -> bool:
        """Whether memory for so many tokens holds those that are there: rows may have been chosen or moved since."""
        return (
            bool(self._memory)
            and self._shown is self.keys
            and self._memory[0].shape[2] >= end
            and self._memory[0].is_inference() == torch.is_inference_mode_enabled()
        )


def full_layer(max_length: int | None, cache_dtype: str | None = None) -> SequenceLayer:
    """A layer that keeps all tokens; static if the cache has a maximum length."""
    if max_length is None:
        return GrowingLayer(cache_dtype)
    return window_layer(max_length, ALL_TOKENS, cache_dtype=cache_dtype)


def _larger(states: Tensor, end: int) -> Tensor:
    batch, heads, kept, size = states.shape
    memory = states.new_empty(batch, heads, (end // BLOCK + 1) * BLOCK, size)
    memory[:, :, :kept] = states
    return memory
