"""Linear attention with a softmax window (Based, arXiv 2402.18668; LoLCATs, Zhang et al. 2024, arXiv 2410.10254).

The nearest keys count with their softmax terms, all others with their features, and one sum
normalises both, so every key is counted exactly once. A learned gate g per query head, 0 at the
start, weighs the window against what lies beyond it:

              sum_near e^(s_ij + g) v_j  +  sum_far phi(q_i) . phi(k_j) v_j
    out_i  =  -------------------------------------------------------------      s_ij = scaling * q_i . k_j
              sum_near e^(s_ij + g)      +  sum_far phi(q_i) . phi(k_j)

    causal, window 3           bidirectional, window 2      x near, . far
    0 x                        0 x x . . .
    1 x x                      1 x x x . .
    2 x x x                    2 . x x x .
    3 . x x x                  3 . . x x x
    4 . . x x x                4 . . . x x
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_attnkit.attention.kernels import linear_sums
from hf_attnkit.attention.kernels.feature_maps import Map


def around(query: Tensor, phi: Map, keys: linear_sums.Keys, offset: int) -> Iterator[Tensor]:
    """Bidirectional, without a window: sums over the keys up to each query's own, and over those after it, which decay
    by the query's own token as those before it do; query 0 is at key `offset`."""
    after = linear_sums.suffix(query, phi, keys, offset + 1, 1)
    if keys.decay is not None:
        own = torch.arange(offset, offset + query.shape[2], device=query.device).clamp(0, keys.length - 1)
        left = keys.decays(own).exp()[..., None]
        after = after * left.repeat_interleave(query.shape[1] // left.shape[1], dim=1)
    start = 0
    for before in linear_sums.prefix(query, phi, keys, offset, linear_sums.LinearState()):
        stop = start + before.shape[2]
        yield before + after[:, :, start:stop]
        start = stop


def outside(query: Tensor, phi: Map, keys: linear_sums.Keys, offset: int, window: int) -> Iterator[Tensor]:
    """Bidirectional: sums over the keys `window` or more before and after each query; query 0 is
    at key `offset`. Two sums, since all keys less those of the window would cancel."""
    after = linear_sums.suffix(query, phi, keys, offset + window, window)
    start = 0
    for before in linear_sums.prefix(query, phi, keys, offset - window, linear_sums.LinearState(), window):
        stop = start + before.shape[2]
        yield before + after[:, :, start:stop]
        start = stop


class Gate(nn.Module):
    """g of the formula above, one number per query head, 0 at the start; higher: more of the window."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads))

    def forward(self, num_heads: int) -> Tensor:
        """`(num_heads, 1, 1)`."""
        if self.weight.shape[0] != num_heads:
            raise ValueError(
                f"the gate was made for {self.weight.shape[0]} query heads and there are {num_heads}; make a new one "
                "for the layer as it is now"
            )
        return self.weight[:, None, None]


@dataclass(frozen=True)
class Branches:
    """What some queries get from the keys beyond their window, and from those within it.

    Attributes:
        far: the linear part, normalised on its own, `(B, H, Q, D)`, and its normaliser `(B, H, Q, 1)`; both 0 where
            there is no such key. `None` where the window alone counts.
        near: the window's softmax attention `(B, H, Q, D)`, 0 where the window is empty, and its log-sum-exp
            `(B, H, Q)`, -inf there. `None` where there is no window, or what lies beyond it alone counts.
        gate: `(H, 1, 1)`, g of the formula above; `None` for 0.
    """

    far: tuple[Tensor, Tensor] | None
    near: tuple[Tensor, Tensor] | None
    gate: Tensor | None

    def output(self) -> Tensor:
        """Both under one normaliser, `(B, H, Q, D)`."""
        if self.far is None or self.near is None:
            return (self.far or self.near)[0]  # type: ignore[index] # one of both is there
        far = self.far[0]
        return torch.lerp(far, self.near[0].to(far.dtype), self._weighed().masked_fill(self.far[1] <= 0, 1.0))

    def shares(self) -> tuple[Tensor, Tensor]:
        """What of the output is the window's, and what is of the keys beyond it, each `(B, H, Q, D)`."""
        if self.far is None or self.near is None:
            one = self.output()
            one = one if one.dtype == torch.float64 else one.float()
            zero = torch.zeros_like(one)
            return (zero, one) if self.near is None else (one, zero)
        far = self.far[0]
        share = self._weighed().masked_fill(self.far[1] <= 0, 1.0)
        return self.near[0].to(far.dtype) * share, far * (1 - share)

    def _weighed(self) -> Tensor:
        """The window's weight `(B, H, Q, 1)`, some number where there is nothing beyond it.

        With T the far normaliser and L the log-sum-exp of the window, the formula above is a mean of the two
        normalised parts, the window's weight being e^g e^L / (e^g e^L + T) = sigmoid(L - ln T + g): no exponential of a
        score is ever formed, so none overflows. g is 0 without a gate.
        """
        assert self.far is not None and self.near is not None
        far, total = self.far
        logit = self.near[1][..., None].to(far.dtype) - total.masked_fill(total <= 0, 1.0).log()
        return torch.sigmoid(logit if self.gate is None else logit + self.gate.to(far.dtype))
