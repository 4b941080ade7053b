"""Fit output projections in closed form, so that changed attention gives what the untouched model gave.

With a_t the heads' outputs of the changed layer for token t (the layers below changed too) and y_t the
untouched model's attention output for the same token:

    W = argmin  sum_t |W a_t - y_t|^2  +  lambda |W - W_o|^2,     lambda = ridge * mean diagonal of sum_t a_t a_t^T

A bias, where there is one, is free: the sums are then of a_t and y_t less their means. It generalises
the rescaling of heads by Kwon et al. 2022 (arXiv 2204.09656) and takes no labels and no gradients.

After pruning y_t is, as theirs, what brings the residual stream to where the untouched model has it behind the
attention, so that a layer also makes up for what those below it lost: with x_t the stream before the attention and a
prime for the untouched model, y_t = (x'_t + y'_t) - x_t.

Layer by layer from the bottom, each on what the refitted layers below give it: all layers in one
pass measured more than twice the perplexity (see docs/conversion.md). The models do not start anew for each layer
(see `walk`), so the whole refit takes about three forward passes of each. Kept for one layer at a time: sum a a^T and
sum y^T a.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_attnkit.editing import projections
from hf_attnkit.editing.change import Change
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.batches import real_tokens, to_device
from hf_attnkit.observing.walk import Walk
from hf_attnkit.refitting.head_scales import scaled
from hf_attnkit.refitting.queries import attention_calls, can_refit, refit_queries

logger = logging.get_logger(__name__)

METHODS = ("output", "scale")
RIDGE = 0.1


class _Sums:
    """Running sums over tokens, with a 1 appended to `a`."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.aa = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.ya = torch.zeros(outputs, inputs + 1, dtype=torch.float64, device=device)

    def add(self, a: Tensor, y: Tensor) -> None:
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, y = a.to(dtype), y.to(dtype)
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        self.aa += a.T @ a
        self.ya += y.T @ a


def refit(
    change: Change,
    batches: Iterable[Mapping[str, Any]],
    *,
    order: Sequence[Sequence[int]] | None = None,
    method: str = "output",
    stream: bool = False,
    ridge: float = RIDGE,
) -> None:
    """Refit the output projections of all layers after `change`, which was applied.

    Args:
        change: gives every layer's output projection new parameters, and its query projection if those are fitted.
        batches: model inputs; padding is left out. Kept, since every layer runs them.
        order: given where keys changed, to fit the query projections too, each layer's before its output, see
            `attention_match`: per layer, which key head of the untouched model stands where now. Layers stay out
            whose queries are normed, or whose attention is no softmax (linear).
        method: "output" solves for the whole projection, "scale" for one factor per head (see `rescale`).
        stream: fit the residual stream after the attention, and not what the attention alone puts out; without `order`.
        ridge: towards the present projection, as a share of the mean diagonal of sum a a^T.

    Raises:
        ValueError: for no batches or activations that are not finite; the model is then as before the change.
    """
    assert order is None or not stream
    model = change.model
    try:
        inputs = [to_device(batch, model) for batch in batches]
        if not inputs:
            raise ValueError("refit needs calibration batches, and got none (an iterator is spent after one use)")
        untouched, changed = ([Walk(model, batch) for batch in inputs] for _ in range(2))
        for layer in tqdm(attention_layers(model), desc="refit", unit="layer"):
            assert change.covers(layer.output) and (change.covers(layer.query) or order is None), layer.name
            if order is not None and can_refit(layer):
                with change.undone(), attention_calls(model, layer) as run:
                    calls = [run(walk).in_order(order[layer.index]) for walk in untouched]
                before, after = refit_queries(model, layer, changed, inputs, calls)
                logger.info(
                    f"{layer.name}: KL divergence from the untouched attention {before:.3g} -> {after:.3g} nats"
                )
                targets = [call.output for call in calls]
            else:
                with change.undone():
                    targets = [_target(walk, layer, stream) for walk in untouched]
            sums = _Sums(layer.output.in_features, layer.output.out_features, layer.output.weight.device)
            for batch, walk, target in zip(inputs, changed, targets, strict=True):
                if stream:
                    target = target - walk.before(layer.index)
                heads, _ = walk.seen(layer.index, layer.output)
                sums.add(real_tokens(heads, batch), real_tokens(target, batch))
            if not (sums.aa.isfinite().all() and sums.ya.isfinite().all()):
                raise ValueError(
                    f"layer {layer.index}: attention outputs contain NaN or infinity; run the model in bfloat16 or "
                    "float32 and look for a batch that breaks it"
                )
            if method == "scale":
                weight, bias = scaled(sums.aa, sums.ya, layer.output, layer.head_dim, ridge)
            else:
                weight, bias = solve(sums.aa, sums.ya, layer.output, ridge)
            projections.apply(projections.Edit(layer.output, weight, bias))
    except BaseException:
        change.undo()
        raise


def _target(walk: Walk, layer: AttentionLayer, stream: bool) -> Tensor:
    """What the untouched model has after the attention: its output, or the residual stream with it."""
    output = walk.seen(layer.index, layer.output)[1]
    return output + walk.before(layer.index) if stream else output


def solve(aa: Tensor, ya: Tensor, linear: nn.Linear, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The ridge solution from the sums, in the projection's dtype.

    Args:
        aa: `(m + 1, m + 1)`, sum of [a; 1] [a; 1]^T, float64.
        ya: `(M, m + 1)`, sum of y [a; 1]^T.
    """
    count, old = aa[-1, -1], linear.weight.detach().double()
    gram, cross = aa[:-1, :-1], ya[:, :-1]
    mean, target_mean = aa[:-1, -1] / count, ya[:, -1] / count
    if linear.bias is not None:
        gram = gram - count * torch.outer(mean, mean)
        cross = cross - count * torch.outer(target_mean, mean)
    strength = ridge * gram.diagonal().mean()
    # Heads that put out nothing leave their columns undetermined, where they stay.
    strength = strength.clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + strength * identity, (cross + strength * old).T).T
    bias = None if linear.bias is None else (target_mean - weight @ mean).to(linear.bias.dtype)
    return weight.to(linear.weight.dtype), bias
