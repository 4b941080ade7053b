"""Gates learned under a price for every open one (Voita et al. 2019, arXiv 1905.09418).

The hard-concrete gate (Louizos et al. 2018, arXiv 1712.01312), u uniform in (0, 1):

    s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta)       z = min(1, max(0, s (zeta - gamma) + gamma))

is 0 with positive probability, and P(z != 0) = sigmoid(log_alpha - beta ln(-gamma / zeta)) can be differentiated. What
is minimised over log_alpha alone, the model's weights staying as they are, is loss + penalty * sum_h P(z_h != 0).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import integer, number
from hf_attnkit.common.options import store
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.importance.gates import gated
from hf_attnkit.importance.loss import batch_loss, same_config, with_labels
from hf_attnkit.importance.processes import over_processes
from hf_attnkit.importance.score import Batches, ScoreOfLoss
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.batches import on_device

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 2.0  # log_alpha: P(z != 0) = 0.97


@dataclass(frozen=True)
class L0(ScoreOfLoss):
    """The log-odds that the gate is open, ln P(z != 0) / P(z = 0), in nats; negative: more probably closed.

    The gates are trained for a number of steps with Adam, one batch a step, again from the first when they are through.
    All heads draw once a step. Of several processes each takes a batch of its own share, with the same gates: a step
    of two processes is one of a single process on both batches together.

    Attributes:
        steps: number of batches.
        penalty: price of an open gate, in the loss's unit (nats for cross-entropy).
        learning_rate: Adam's, for log_alpha.
        seed: of the draws.
    """

    name = "l0"

    steps: int = 200
    penalty: float = 0.01
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        store(
            self,
            steps=integer(self.steps, "steps", minimum=1),
            penalty=number(self.penalty, "penalty", above=0),
            learning_rate=number(self.learning_rate, "learning_rate", above=0),
            seed=integer(self.seed, "seed", minimum=0),
        )

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        log_alphas = [torch.full((layer.num_heads,), START, requires_grad=True) for layer in layers]
        optimizer = torch.optim.Adam(log_alphas, lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        cycle = itertools.islice(itertools.cycle(list(batches)), self.steps)
        for batch in on_device(model, cycle, description="l0", labels=True):
            with torch.enable_grad(), evaluation_mode(model), same_config(model):
                # Of what `rand` gives, 0 has no logarithm.
                uniform = [torch.rand(len(a), generator=generator).clamp(min=1e-6) for a in log_alphas]
                gates = [sample(log_alpha, u) for log_alpha, u in zip(log_alphas, uniform, strict=True)]
                inputs, terms = with_labels(model, batch, self.labels)
                number = float(terms.sum())
                gradients = [torch.zeros_like(log_alpha) for log_alpha in log_alphas]
                if number:
                    with gated(layers, inputs, _given(gates)):
                        loss = batch_loss(model, inputs)
                    gradients = list(torch.autograd.grad(number * loss, log_alphas))
                sums = [torch.cat([gradient, gradient.new_tensor([number])]) for gradient in gradients]
                added = over_processes(layers, sums, "gradients of the loss by the gates")
                open_gates = torch.stack([log_odds(log_alpha).sigmoid().sum() for log_alpha in log_alphas]).sum()
                price = self.penalty * open_gates
                prices = torch.autograd.grad(price, log_alphas)
            for log_alpha, total, paid in zip(log_alphas, added, prices, strict=True):
                log_alpha.grad = (total[:-1] / total[-1].clamp(min=1)).to(paid) + paid
            optimizer.step()
        return [log_odds(log_alpha.detach()) for log_alpha in log_alphas]


def log_odds(log_alpha: Tensor) -> Tensor:
    """ln P(z != 0) / P(z = 0)."""
    return log_alpha - BETA * math.log(-GAMMA / ZETA)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates z in [0, 1] from uniform numbers in (0, 1); differentiable by `log_alpha`."""
    s = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _given(gates: Sequence[Tensor]) -> Callable[[int, Tensor], Tensor]:
    return lambda place, heads: gates[place].to(heads.device)
