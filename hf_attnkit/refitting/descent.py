"""Fit a layer's queries, keys, values and outputs together, by gradient descent on the layer's own error.

With o_t what the changed layer's attention puts out for token t, and y_t what it should put out, steps of Adam (Kingma
and Ba 2015, arXiv 1412.6980) lower

    sum_t |o_t - y_t|^2 / sum_t |y_t|^2

for one batch after another. No labels, and no gradient through another layer: what the layer gets is fixed. A step is a
share of the mean size of the weights, and falls to zero. The weights after each pass over the batches are compared on
the sequences set aside, and the best stay, those before the first pass among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import frozen
from hf_attnkit.editing import projections
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.walk import Walk

# The first step, as a share of the root mean square of each matrix. Of 0.05 a layer of MiniLM ended further off.
RATE = 0.02
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Aim:
    """One batch of a layer's descent.

    Attributes:
        walk: of the changed model.
        target: `(B, ..., M)`, what the output projection should put out.
        counts, unseen: `(B, ...)`, what each token counts in the fit, and in the choice among the passes.
    """

    walk: Walk
    target: Tensor
    counts: Tensor
    unseen: Tensor


def descend(
    model: PreTrainedModel, layer: AttentionLayer, modules: Sequence[nn.Linear], batches: Sequence[Aim], passes: int
) -> tuple[float, float]:
    """Change the parameters of these modules of a layer. Each gets parameters of its own, whatever is put back later.

    Args:
        modules: projections of the layer.
        passes: over the batches; a forward and a backward pass of the layer for each batch of each, and a forward pass
            for the comparison.

    Returns:
        The error, as a share of the targets' sum of squares, before and after; on what is unseen where there is some.
    """
    for module in modules:
        # A module's own numbers, which an edit that is kept for later does not share.
        weight, bias = module.weight, module.bias
        own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        own_bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        projections.apply(projections.Edit(module, own, own_bias))
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    # Steps are smaller than the rounding of 16 bits.
    wide = [parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)) for parameter in parameters]
    sizes = [float(each.square().mean().sqrt()) for each in wide]
    optimizer = torch.optim.Adam(
        [{"params": [each], "lr": RATE * size} for each, size in zip(wide, sizes, strict=True)], betas=BETAS
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    energy = float(sum((batch.target.float().square().sum(-1) * batch.counts).sum() for batch in batches)) / len(
        batches
    )
    asked = [parameter.requires_grad for parameter in parameters]
    first = least = _error(layer, batches)
    best = [parameter.detach().clone() for parameter in parameters]
    step, total = 0, passes * len(batches)
    try:
        with frozen(model):
            for parameter in parameters:
                parameter.requires_grad_(True)
            for _ in range(passes if energy > 0 else 0):
                for batch in batches:
                    lost = (_lost(layer, batch, grad=True) * batch.counts).sum() / energy
                    gradients = torch.autograd.grad(lost, parameters, allow_unused=True)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
                    for master, gradient in zip(wide, gradients, strict=True):
                        master.grad = None if gradient is None else gradient.to(master.dtype)
                    optimizer.step()
                    _write(parameters, wide)
                    step += 1
                error = _error(layer, batches)
                if error < least:
                    least, best = error, [parameter.detach().clone() for parameter in parameters]
    finally:
        _write(parameters, best)
        for parameter, asks in zip(parameters, asked, strict=True):
            parameter.requires_grad_(asks)
    return first, least


def _lost(layer: AttentionLayer, batch: Aim, *, grad: bool = False) -> Tensor:
    """`(B, ...)`, each token's squared error."""
    output = batch.walk.seen(layer.index, layer.output, grad=grad).output
    return (output.float() - batch.target.float()).square().sum(-1)


def _error(layer: AttentionLayer, batches: Sequence[Aim]) -> float:
    """See `descend`."""
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (counts, unseen) x (lost, of)
    for batch in batches:
        both = torch.stack([_lost(layer, batch), batch.target.float().square().sum(-1)])
        for own, counts in zip(sums, (batch.counts, batch.unseen), strict=True):
            own += (both * counts).flatten(1).sum(1).cpu()
    lost, of = sums[1] if sums[1, 1] > 0 else sums[0]
    return float(lost / of) if of > 0 else 0.0


def _write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
