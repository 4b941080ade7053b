"""phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236): `head_dim` features, nothing learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.kernels.feature_maps.wide import wide


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, written so that e^x of a negative x keeps its digits instead of losing them to -1 + 1.

    Its slope at 0 is 1, which `clamp` leaves out in some releases of PyTorch.
    """
    x = wide(x)
    return F.relu(x) + torch.exp(x.masked_fill(x > 0, 0.0))
