"""How a rotary embedding pairs the components of a head, read off the gradient.

A rotation mixes two components and no others, so the gradient of one component of a query by its head's rows is zero
except in these two:

    component f of query head 0 depends on rows {f, f + half}   "half" (Llama)
                                           rows {2f, 2f + 1}    "interleaved" (GPT-J, Cohere)
                                           row {f}              not rotated

Where a norm makes each component depend on the whole head, the norm's own weight tells the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_attnkit.models.attention import Attention
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.random_run import RandomRun


@dataclass(frozen=True)
class Rope:
    """How a layer's keys are rotated between projection and product.

    Attributes:
        pairing: "half" or "interleaved", see `Family`.
        size: how many components of a head are rotated; they are its first ones.
    """

    pairing: str
    size: int

    def pairs(self) -> tuple[list[int], list[int]]:
        """Indices of the first and of the second component of each rotated pair."""
        if self.pairing == "half":
            return list(range(self.size // 2)), list(range(self.size // 2, self.size))
        return list(range(0, self.size, 2)), list(range(1, self.size, 2))


@dataclass(frozen=True)
class RotaryPairs:
    """The rotated pairs.

    Attributes:
        pairing: "half", "interleaved", or "other".
        pairs: rows of a head's projection (counted in the head) that a rotation mixes.
    """

    pairing: str
    pairs: tuple[tuple[int, int], ...]

    @property
    def rope(self) -> Rope | None:
        """The same as a `Rope`; `None` where it is none: other pairs, or not a head's first components."""
        rope = Rope(self.pairing, 2 * len(self.pairs))
        known = self.pairing in ("half", "interleaved") and set(zip(*rope.pairs(), strict=True)) == set(self.pairs)
        return rope if known else None


def rotary_pairs(
    model: nn.Module, attention: Attention, owned: Ownership, leaves: dict[str, Tensor] | None = None
) -> RotaryPairs | None:
    """The pairs of components that rotate together; `None` without a rotary embedding, or where it cannot be told.

    Args:
        leaves: as of `RandomRun`.
    """
    if not attention.calls_interface:
        return None
    with quiet(model), torch.enable_grad():
        run = RandomRun(attention, leaves)
        run.forward()
        query = run.heads["query"][0]  # (batch, positions, head_dim)
        for name in _telling(run, attention, owned):
            own = owned.owned.get(name)
            rows, dim = (None, 0) if own is None else (own.of("query", 0), own.dim)
            touched = [_touched(query[..., f], run, name, rows, dim) for f in range(query.shape[-1])]
            if all(0 < len(each) <= 2 for each in touched):
                return _named({tuple(each) for each in touched if len(each) == 2})
    return None


def _telling(run: RandomRun, attention: Attention, owned: Ownership) -> list[str]:
    """Parameters with a row for each component of a head: the query's projections, and norms."""
    projections = [name for name, one in owned.owned.items() if "query" in one.rows]
    norms = [name for name in owned.shared if tuple(run.leaves[name].shape) == (attention.head_dim,)]
    return projections + norms


def _touched(component: Tensor, run: RandomRun, name: str, rows: Tensor | None, dim: int) -> list[int]:
    """The rows, of a head's or of all, that a component depends on."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(component.shape, generator=generator, dtype=component.dtype).to(component.device)
    found = run.touched((component * weights).sum(), only=name)
    if name not in found:
        return []
    touched = found[name][dim]
    touched = touched if rows is None else touched.index_select(0, rows.to(touched.device))
    numbers: list[int] = touched.nonzero()[:, 0].tolist()
    return numbers


def _named(pairs: set[tuple[int, ...]]) -> RotaryPairs | None:
    if not pairs:
        return None
    ordered = tuple(sorted((a, b) for a, b in pairs))
    half = len(ordered)
    if ordered == tuple((f, f + half) for f in range(half)):
        return RotaryPairs("half", ordered)
    if ordered == tuple((2 * f, 2 * f + 1) for f in range(half)):
        return RotaryPairs("interleaved", ordered)
    return RotaryPairs("other", ordered)
