"""How close scores of heads must be."""

from __future__ import annotations

import torch


def tolerance(scale: float = 1.0) -> float:
    """Two float32 runs of the model and of the entropy: sums of at most 96 terms in each of two layers,
    scores up to about 20: 4 * eps * sqrt(96) * 20. A padding query too many moves a score by 1e-2."""
    return 4 * torch.finfo(torch.float32).eps * 96**0.5 * 20 * scale
