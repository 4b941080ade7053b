"""A swapped model whose layers compute their kind as one expression of any length, for a while.

The kernels loop over tiles and choose by size: right for PyTorch, and nothing that a graph holds which is traced once
and then run at other lengths. `Kind.of_any_length` says the same as one expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kind import ATTRIBUTE, NO_CALL, Call, Kind
from hf_attnkit.attention.mask import Mask


@dataclass(frozen=True)
class AnyLength(Kind):
    """A kind by its `of_any_length`. It makes no cache layer of its own, so that all keys arrive.

    Attributes:
        of: the kind.
    """

    name = "any_length"
    own_window = True

    of: Kind

    def __getattribute__(self, name: str) -> Any:
        # What a kind says about itself, it says of the one that it runs.
        if name in ("forms_scores", "call_arguments", "self_attention_only", "takes_documents"):
            return getattr(object.__getattribute__(self, "of"), name)
        return object.__getattribute__(self, name)

    def seen(self, mask: Mask, shape: torch.Size, call: Call = NO_CALL) -> Mask:
        return self.of.seen(mask, shape, call)

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
        """As `Kind.of_any_length`; `dropout` is 0 outside training."""
        return self.of.of_any_length(query, key, value, mask, scaling=scaling, call=call), None

    def __str__(self) -> str:
        return str(self.of)


@contextmanager
def any_length(model: nn.Module) -> Iterator[None]:
    """Run each layer's kind by its `of_any_length`; layers that keep Transformers' own attention run that."""
    kinds = {module: kind for module in model.modules() if isinstance(kind := getattr(module, ATTRIBUTE, None), Kind)}
    try:
        for module, kind in kinds.items():
            setattr(module, ATTRIBUTE, AnyLength(kind))
        yield
    finally:
        for module, kind in kinds.items():
            setattr(module, ATTRIBUTE, kind)
