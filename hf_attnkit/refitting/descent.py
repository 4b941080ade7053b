"""Fit a layer's queries, keys, values and outputs together, by gradient descent on the layer's own error.

With o_t what the changed layer's attention puts out for token t, and y_t what it should put out, the steps of Adam
(Kingma and Ba 2015, arXiv 1412.6980) lower

    sum_t |o_t - y_t|^2 / sum_t |y_t|^2

for one batch after another. No labels, and no other layer's gradient: what the layer gets is fixed. A step's length is a
share of the mean size of the weights, and falls to zero. The weights after each pass over the batches are compared on
the sequences set aside, and the best stay, those before the first among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import frozen
from hf_attnkit.editing import projections
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.walk import Walk

# The first step, as a share of the root mean square of a weight.
RATE = 0.02


@dataclass(frozen=True)
class Aim:
    """One batch of a layer's descent.

    Attributes:
        walk: of the changed model.
        target: `(B, T, M)`, what the output projection should put out.
        counts, unseen: `(B, T)`, what each token counts in the fit, and in the choice among its passes.
    """

    walk: Walk
    target: Tensor
    counts: Tensor
    unseen: Tensor


def descend(
    model: PreTrainedModel, layer: AttentionLayer, modules: Sequence[nn.Module], batches: Sequence[Aim], passes: int
) -> tuple[float, float]:
    """Change the parameters of these modules of a layer.

    Args:
        modules: projections of the layer; each gets parameters of its own.

    Returns:
        The error, as a share of the targets' sum of squares, before and after; of what is set aside where there is
        some.
    """
    for module in modules:
        weight, bias = module.weight, module.bias
        new = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        projections.apply(
            projections.Edit(module, new, None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad))  # type: ignore[arg-type]
        )
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    sizes = [float(parameter.detach().float().square().mean().sqrt()) for module in modules for parameter in module.parameters(recurse=False)]
    optimizer = torch.optim.Adam(
        [{"params": [each], "lr": RATE * size} for each, size in zip(parameters, sizes, strict=True)], betas=(0.9, 0.99)
    )
    total = passes * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1))))
    energy = sum(float((batch.target.square().sum(-1) * batch.counts).sum()) for batch in batches) / len(batches)
    asked = [parameter.requires_grad for parameter in parameters]
    best: list[Tensor] = []
    first = least = math.inf
    with frozen(model):
        for parameter in parameters:
            parameter.requires_grad_(True)
        for number in range(passes + 1):
            error = _error(layer, batches)
            if number == 0:
                first = error
            if not best or error < least:
                least, best = error, [parameter.detach().clone() for parameter in parameters]
            if number == passes:
                break
            for batch in batches:
                lost = _lost(layer, batch, grad=True) * batch.counts
                optimizer.zero_grad()
                (lost.sum() / energy).backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        for parameter, tensor, asks in zip(parameters, best, asked, strict=True):
            parameter.copy_(tensor)
            parameter.grad = None
            parameter.requires_grad_(asks)
    return first, least


def _lost(layer: AttentionLayer, batch: Aim, *, grad: bool = False) -> Tensor:
    output = batch.walk.seen(layer.index, layer.output, grad=grad).output
    return (output - batch.target).square().sum(-1)


def _error(layer: AttentionLayer, batches: Sequence[Aim]) -> float:
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for batch in batches:
        lost, energy = _lost(layer, batch), batch.target.square().sum(-1)
        for row, counts in enumerate((batch.counts, batch.unseen)):
            sums[row] += torch.stack([(each * counts).sum() for each in (lost, energy)]).cpu()
    row = sums[1] if sums[1, 1] > 0 else sums[0]
    return float(row[0] / row[1])
