"""A cache layer of two parts: all tokens of some heads, and a window with sinks of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.mask import Mask


class HeadsLayer(SequenceLayer):
    """`update` returns keys and values of the heads that keep all tokens; those of the others are in `near_keys`.

    Of the first tokens it returns those of all heads.

    Attributes:
        is_first: whether the tokens added last were the first.
        heads: the key/value heads of the window.
        far: keeps all tokens of the other heads.
        near: keeps the window.
        division: as `divided` gives it, once there are tokens.
        near_keys, near_values: what the new tokens may attend to in the heads of the window, `(B, heads, kept, D)`.
    """

    near_keys: Tensor
    near_values: Tensor
    division: tuple[Tensor, Tensor, Tensor]

    def __init__(self, heads: tuple[int, ...], far: SequenceLayer, near: SequenceLayer) -> None:
        super().__init__(far.max_length, far.cache_dtype)
        self.heads, self.far, self.near = heads, far, near
        self.is_first, self._is_empty = False, True
        self.is_compileable = far.is_compileable and near.is_compileable

    @property
    def keeps_apart(self) -> bool:
        return True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.division = divided(self.heads, key_states.shape[1], key_states.device)
        for part, heads in zip((self.far, self.near), self.division, strict=False):
            part.lazy_initialization(key_states[:, heads], value_states[:, heads])
        self._follow()

    def _add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        returned = []
        for part, heads in zip((self.far, self.near), self.division, strict=False):
            part.announced = True
            returned.append(part.update(key_states[:, heads], value_states[:, heads]))
        self._follow()
        (keys, values), (self.near_keys, self.near_values) = returned
        self.is_first, self._is_empty = self._is_empty, False
        return (key_states, value_states) if self.is_first else (keys, values)

    def near_mask(self, mask: Mask) -> Mask:
        """The mask of the window's keys, from that of the far ones: these are all tokens, each at its position."""
        queries, kept = mask.query_position.shape[1], self.near_keys.shape[2] - self.near.num_sinks
        positions = self.near.positions(kept, mask.key_position.device)
        inside, columns = positions >= 0, positions.clamp(min=0)
        visible = mask.key_visible
        if visible is not None:
            visible = visible[:, columns] & inside
        elif self.max_length is not None:
            visible = inside[None]
        dense = None if mask.dense is None else mask.dense[..., columns] & inside
        bias = None if mask.bias is None else mask.bias[..., columns]
        return replace(
            mask, key_position=positions[None], key_visible=visible, dense=dense, bias=bias,
            known_offset=kept - queries,
        )  # fmt: skip

    def prepare(self, mask: Mask) -> None:
        self.far.prepare(mask)
        self.near.prepare(self.near_mask(mask))

    def settle(self, mask: Mask) -> None:
        near = self.near_mask(mask)
        self.far.settle(mask)
        self.near.settle(near)
        del self.near_keys, self.near_values
        self._follow()

    def positions(self, kv_length: int, device: torch.device) -> Tensor:
        return self.far.positions(kv_length, device)

    def query_positions(self, q_length: int, device: torch.device) -> Tensor:
        return self.far.query_positions(q_length, device)

    def reset(self) -> None:
        self._both("reset")
        self._is_empty = True

    def offload(self) -> None:
        self._both("offload")

    def prefetch(self) -> None:
        self._both("prefetch")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._both("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._both("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._both("batch_repeat_interleave", repeats)

    def _both(self, method: str, *arguments: Any) -> None:
        for part in (self.far, self.near):
            getattr(part, method)(*arguments)
        self._follow()

    def _follow(self) -> None:
        """Transformers reads these of a layer; they are the far part's."""
        far = self.far
        self.is_initialized, self.seen = far.is_initialized, far.seen
        self.keys, self.values = far.keys, far.values
        if far.is_initialized:
            self.dtype, self.device = far.dtype, far.device


def divided(heads: tuple[int, ...], number: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of `number` heads the others, these, and where each is when the others come first."""
    others = [head for head in range(number) if head not in heads]
    order = [*others, *heads]
    places = [order.index(head) for head in range(number)]
    far, near, back = (torch.tensor(each, dtype=torch.long, device=device) for each in (others, heads, places))
    return far, near, back
