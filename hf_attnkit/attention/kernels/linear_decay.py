"""A decay of linear attention's state: one factor per key/value head and token, in (0, 1).

    S_t = a_t S_(t-1) + phi(k_t) [v_t, 1]^T,          a_t = sigmoid(w . k_t + b)

so that between key j and a query i that reads S_i the features count a_(j+1) a_(j+2) ... a_i times. With a constant a
(w = 0) this is RetNet's retention (Sun et al. 2023, arXiv 2307.08621) with a normaliser that decays with the values.
With w trained it is the scalar gated state of Mamba-2's state-space duality (Dao and Gu 2024, arXiv 2405.21060), where
A is a scalar per head and token, and gated linear attention (Yang et al. 2024, arXiv 2312.06635) with a scalar gate.

It starts with w = 0 and memories 1 / (1 - a) spread from 16 to 4,096 tokens over the G key/value heads, as RetNet
spreads its gammas:

    a_g = 1 - 2^-(4 + 8 g / (G - 1)),      b_g = ln(a_g / (1 - a_g)),      g = 0 .. G - 1;  256 tokens where G = 1

All is kept as logarithms, which are never positive: what is left over several tokens is the exponential of a sum of
them, so it never overflows, and nothing is divided by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_attnkit.attention.kernels.feature_maps.wide import wide


class Decay(nn.Module):
    """ln a_t of each key/value head: `(B, G, tokens, head_dim)` keys to `(B, G, tokens)`, float32 or better.

    The keys are those that the model hands out, after RoPE where there is one.
    """

    def __init__(self, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_key_value_heads, head_dim))
        self.bias = nn.Parameter(starting_bias(num_key_value_heads))

    def forward(self, key: Tensor) -> Tensor:
        if (key.shape[1], key.shape[3]) != tuple(self.weight.shape):
            raise ValueError(
                f"the decay was made for {self.weight.shape[0]} key/value heads of size {self.weight.shape[1]} and got "
                f"{key.shape[1]} heads of size {key.shape[3]}; make a new one for the layer as it is now"
            )
        key = wide(key)
        logits = torch.einsum("bgkd,gd->bgk", key, self.weight.to(key.dtype)) + self.bias.to(key.dtype)[:, None]
        return F.logsigmoid(logits)


def starting_bias(num_key_value_heads: int) -> Tensor:
    """b `(G,)` of the formula above, float32."""
    share = torch.arange(num_key_value_heads).double() / (num_key_value_heads - 1) if num_key_value_heads > 1 else 0.5
    return torch.as_tensor(2 ** (4 + 8 * share) - 1).double().reshape(-1).log().float()


def spans(logs: Tensor) -> Tensor:
    """For ln a_t `(..., n)` the sums over t = j + 1 .. i, `(..., n, n)` at [i, j]; -inf for i < j.

    Each is a sum of its own, as in Mamba-2: differences of one running sum would lose the digits of what lies between
    two tokens to all that lies before them, and give -inf less -inf after a factor of 0.
    """
    length = logs.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool, device=logs.device).tril()
    terms = logs[..., :, None].expand(*logs.shape, length).masked_fill(~seen.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~seen, -torch.inf)


def after(logs: Tensor) -> Tensor:
    """For ln a_t `(..., n)` the sums over t = j + 1 .. n - 1, `(..., n)` at [j]."""
    return F.pad(logs, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)


def factors(logs: Tensor, distance: Tensor, offset: int, window: int) -> Tensor:
    """What the features of every key count for every query, as a matrix: `(B, G, Q, K)`, in the dtype of `logs`.

    The sums are differences of a running sum in float64, which keeps the digits that `spans` is about.

    Args:
        logs: ln a_t of the keys, `(B, G, K)`, 0 for padding.
        distance: query position minus key position, `(1, 1, Q, K)`.
        offset: index of the key at the first query's position.
        window: 0 for none. A query reads the state before its window, and that after it, so that decay counts from the
            window's edge.

    Returns:
        Factors for keys outside the window, of the past and of the future; 1 within it.
    """
    total = logs.double().cumsum(-1)  # over t = 0 .. j
    before = total - logs.double()  # over t = 0 .. j - 1
    length = logs.shape[-1]
    own = torch.arange(distance.shape[2], device=logs.device) + offset
    edge, far_edge = ((own + step).clamp(0, length - 1) for step in (-window, window))
    past = total[..., edge, None] - total[..., None, :]
    future = before[..., None, :] - before[..., far_edge, None]
    # What a query does not read from here has no factor; it is masked before the exponential, which could overflow.
    past = past.masked_fill(distance < max(window, 1), 0.0)
    future = future.masked_fill(distance > -max(window, 1), 0.0)
    return (past + future).exp().to(logs.dtype)
