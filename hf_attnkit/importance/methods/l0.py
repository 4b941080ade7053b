"""Gates learned under a price for every open one (Voita et al. 2019, arXiv 1905.09418).

The hard-concrete gate (Louizos et al. 2018, arXiv 1712.01312), u uniform in (0, 1):

    s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta)       z = min(1, max(0, s (zeta - gamma) + gamma))

is 0 with positive probability, and P(z != 0) = sigmoid(log_alpha - beta ln(-gamma / zeta)) can be differentiated. What
is minimised over log_alpha alone, the model's weights staying as they are, is loss + penalty * sum_h P(z_h != 0).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.importance.gates import gated
from hf_attnkit.importance.loss import batch_loss, check_labels, same_config, with_labels
from hf_attnkit.importance.processes import over_processes
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.batches import on_device

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 2.0  # log_alpha: P(z != 0) = 0.97


def check(
    *, steps: int = 200, penalty: float = 0.01, learning_rate: float = 0.1, seed: int = 0, labels: str = "given"
) -> None:
    """Raises `ValueError` for a value out of its range."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer of at least 1")
    for name, value in (("penalty", penalty), ("learning_rate", learning_rate)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a number above 0")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r} must be an integer of at least 0")
    check_labels(labels)


def log_odds(log_alpha: Tensor) -> Tensor:
    """ln P(z != 0) / P(z = 0)."""
    return log_alpha - BETA * math.log(-GAMMA / ZETA)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates z in [0, 1] from uniform numbers in (0, 1); differentiable by `log_alpha`."""
    s = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _given(gates: Sequence[Tensor]) -> Callable[[int, Tensor], Tensor]:
    return lambda place, heads: gates[place].to(heads.device)


def score(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    penalty: float = 0.01,
    learning_rate: float = 0.1,
    seed: int = 0,
    labels: str = "given",
) -> list[Tensor]:
    """Train the gates for a number of steps with Adam, one batch a step, again from the first when they are through.

    All heads draw once a step. Of several processes each takes a batch of its own share, with the same gates: a step
    of two processes is one of a single process on both batches together.

    Args:
        penalty: price of an open gate, in the loss's unit (nats for cross-entropy).
        learning_rate: Adam's, for log_alpha.
        labels: see `loss.with_labels`.

    Returns:
        For each layer `(num_heads,)`, float32: the log-odds that the gate is open, ln P(z != 0) / P(z = 0), in nats;
        negative: more probably closed.
    """
    log_alphas = [torch.full((layer.num_heads,), START, requires_grad=True) for layer in layers]
    optimizer = torch.optim.Adam(log_alphas, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    cycle = itertools.islice(itertools.cycle(list(batches)), steps)
    for batch in on_device(model, cycle, description="l0", labels=True):
        with torch.enable_grad(), evaluation_mode(model), same_config(model):
            # Of what `rand` gives, 0 has no logarithm.
            uniform = [torch.rand(len(a), generator=generator).clamp(min=1e-6) for a in log_alphas]
            gates = [sample(log_alpha, u) for log_alpha, u in zip(log_alphas, uniform, strict=True)]
            inputs, terms = with_labels(model, batch, labels)
            number = float(terms.sum())
            gradients = [torch.zeros_like(log_alpha) for log_alpha in log_alphas]
            if number:
                with gated(layers, inputs, _given(gates)):
                    loss = batch_loss(model, inputs)
                gradients = list(torch.autograd.grad(number * loss, log_alphas))
            sums = [torch.cat([gradient, gradient.new_tensor([number])]) for gradient in gradients]
            added = over_processes(layers, sums, "gradients of the loss by the gates")
            price = penalty * torch.stack([log_odds(log_alpha).sigmoid().sum() for log_alpha in log_alphas]).sum()
            prices = torch.autograd.grad(price, log_alphas)
        for log_alpha, total, paid in zip(log_alphas, added, prices, strict=True):
            log_alpha.grad = (total[:-1] / total[-1].clamp(min=1)).to(paid) + paid
        optimizer.step()
    return [log_odds(log_alpha.detach()) for log_alpha in log_alphas]
