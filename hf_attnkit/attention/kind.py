"""What a kind of attention is: its options as fields, what it computes, and what it says about itself.

A kind is one file in `kinds/` with one frozen dataclass, and one line in `table.py`. What runs on a layer is an
instance: `SlidingWindowAttention(window=64)`. It is on the attention module, under `ATTRIBUTE`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.kernels.rotation import Rotation
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common import options

NAME = "hf_attnkit"  # the one name that Transformers knows


ATTRIBUTE = "_hf_attnkit_kind"  # of an attention module: the `Kind` or `Stock` that it runs


PARAMETERS = "hf_attnkit_parameters"  # a submodule of the attention module, so that it is trained and saved with it


ROTATION = "_hf_attnkit_rotation"  # of an attention module: the `Rotation` of its queries and keys, if its kind asks


KEPT = "_hf_attnkit_kept_parameters"  # of an attention module: those of a kind that it ran before, with the same heads


@dataclass(frozen=True)
class Call:
    """What an attention call brings besides query, key, value and mask.

    Attributes:
        cache: the layer that returned key and value, if `Kind.create_cache` made it.
        parameters: what `Kind.create_parameters` made.
        arguments: those keywords of `Kind.call_arguments` that were given to `model(...)`.
        num_heads: of the query; `None` for as many as key/value heads.
        rotation: of the layer's queries and keys, where a kind with `renumber` has to know it.
    """

    cache: SequenceLayer | None = None
    parameters: nn.Module | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_heads: int | None = None
    rotation: Rotation | None = None


NO_CALL = Call()


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of attention with its options.

    A subclass is a frozen dataclass. Its fields are the options, with their defaults; `__post_init__` checks their
    values. It has a `name` and `attention`; everything else has a default here.
    """

    name: ClassVar[str]
    """What users call it, in `swap_attention` and in config.json."""

    needs_transfer: ClassVar[bool] = False
    """Whether a model that was pretrained with softmax attention needs training after the swap."""

    forms_scores: ClassVar[bool] = True
    """Whether it is a softmax of scores: they take a model's position bias and have an entropy."""

    own_window: ClassVar[bool] = False
    """Whether it applies `Mask.window`, a model's own. Otherwise that comes inside a full matrix."""

    takes_documents: ClassVar[bool] = False
    """Whether it applies `Mask.document`, the documents of packed rows. Otherwise they come inside a full matrix."""

    returns_weights: ClassVar[bool] = False
    """Whether it forms attention weights, so that a model can be asked for `output_attentions`."""

    names_heads: ClassVar[bool] = False
    """Whether an option names heads by their numbers, which a change of the heads would move."""

    call_arguments: ClassVar[tuple[str, ...]] = ()
    """Keywords that a user may give to `model(...)`; they arrive in `Call.arguments`."""

    @property
    def self_attention_only(self) -> bool:
        """Whether queries and keys must be of one sequence, as for a window, which is a distance in it."""
        return False

    @abstractmethod
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
        """Attend.

        Args:
            query: `(batch, num_heads, queries, head_dim)`.
            key, value: `(batch, num_key_value_heads, keys, head_dim)`. Consecutive query heads share one of them.
            scaling: factor of the scores.
            dropout: probability of dropping an attention weight; 0 outside training.

        Returns:
            The output `(batch, num_heads, queries, head_dim)`, and the weights `(batch, num_heads, queries, keys)` or
            `None` if it forms none.
        """

    def of_any_length(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, scaling: float, call: Call = NO_CALL
    ) -> Tensor:
        """The output of `attention` as one expression: no tiles, no choice by size, no dropout, no cache of its own.

        For graphs that are traced once and then run at other lengths. By default softmax under the matrix of `seen`,
        quadratic in the length. Arguments and result as `attention`.

        Raises:
            ValueError: if there is no such expression; the message says why.
        """
        if not self.forms_scores:
            raise ValueError(f"{self} says no expression that holds for every length (`Kind.of_any_length`)")
        seen = self.seen(mask.as_matrix(), key.shape, call).as_matrix()
        return backends.attend(query, key, value, seen, scaling=scaling, backend="sdpa")

    @property
    def cached_as(self) -> Kind:
        """The kind whose keys its cache layer keeps: `backend` says which kernel computes the same numbers."""
        if not any(each.name == "backend" for each in fields(self)):
            return self
        kernel: dict[str, Any] = {"backend": "auto"}
        return replace(self, **kernel)

    def check_heads(self, num_heads: int, num_key_value_heads: int) -> None:  # noqa: B027 - a default
        """Raise `ValueError` if a layer with these numbers of heads cannot run it. By default, any can."""

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        """The mask with the kind's own pattern: which keys each query attends to. What measures attention asks here.

        By default, what the mask shows, within the `window` of a kind that has this option.

        Args:
            shape: of the keys, `(batch, num_key_value_heads, keys, head_dim)`.
        """
        window: int | None = getattr(self, "window", None)
        return mask if window is None else mask.within(window)

    def create_cache(self, max_length: int | None) -> SequenceLayer | None:
        """Its layer of a causal model's cache. `None`, the default: Transformers' own, which keeps all keys.

        Args:
            max_length: that of a static cache, else `None`.
        """
        return None

    def create_parameters(self, num_heads: int, num_key_value_heads: int, head_dim: int) -> nn.Module | None:
        """What a layer learns for it, at its start value. `None`, the default: nothing."""
        return None

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in options.changed(self).items())
        return f"{self.name!r} attention" + (f" ({given})" if given else "")


@dataclass(frozen=True)
class Stock:
    """One of Transformers' own implementations ("sdpa", "eager"), on a layer of a swapped model that keeps it."""

    name: str

    call_arguments: ClassVar[tuple[str, ...]] = ()
    """As in `Kind`."""

    @property
    def returns_weights(self) -> bool:
        """As in `Kind`."""
        return self.name == "eager"

    def __str__(self) -> str:
        return f"{self.name!r} attention"


def has_cache(module: nn.Module) -> bool:
    """Whether what the module runs may need a cache layer of its own."""
    kind = getattr(module, ATTRIBUTE, None)
    # A shared position bias (T5) is computed for the keys of the first layer, so all must keep all keys.
    position_bias = hasattr(module, "has_relative_attention_bias")
    return isinstance(kind, Kind) and not position_bias and type(kind).create_cache is not Kind.create_cache
