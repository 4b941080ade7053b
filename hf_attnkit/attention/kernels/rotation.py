"""A rotary position embedding, applied once more: what was rotated by its position moves to another one.

A rotation turns each pair (a, b) of components by the angle position * frequency (Su et al. 2021), so that moving by
d positions turns it by d * frequency, wherever it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """Frequencies, and the components of a head that each turns.

    Attributes:
        frequencies: `(pairs,)`, radians per position.
        interleaved: whether pairs are neighbours (0, 1), (2, 3) ..., or halves (0, n), (1, n + 1) ... of n pairs. They
            are a head's first components; those after them are not rotated.
    """

    frequencies: Tensor
    interleaved: bool

    def back(self, states: Tensor, by: Tensor) -> Tensor:
        """The same at positions that are smaller by `by`.

        Args:
            states: `(B, H, T, D)`, rotated.
            by: `(B or 1, T)`, integer.
        """
        # In float64: an angle of 100,000 in float32 is off by 0.004.
        angle = by[:, None, :, None].double() * self.frequencies.to(states.device, torch.float64)
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        number = self.frequencies.shape[0]
        rotated, rest = states[..., : 2 * number].to(dtype), states[..., 2 * number :]
        if self.interleaved:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., :number], rotated[..., number:]
        pair = first * cos + second * sin, second * cos - first * sin
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(states.dtype), rest], dim=-1)
