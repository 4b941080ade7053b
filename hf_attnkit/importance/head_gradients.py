"""`head_gradients`: each example's gradient by its heads' gates, of which gradient and fisher are the sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import choice
from hf_attnkit.common.state import plain_mode
from hf_attnkit.importance.gates import NO_LABELS, example_gradients
from hf_attnkit.importance.loss import LABELS
from hf_attnkit.importance.processes import all_finite, from_processes
from hf_attnkit.models.layers import scored_layers


@plain_mode()
def head_gradients(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, labels: str = "given") -> Tensor:
    """dL(x) / dxi_h for every example x; xi_h = 1 multiplies the output of head h at all tokens of x.

    What `rearrange_heads` looks at. The mean of its absolute value over examples is the "gradient" score, the sum of
    its square "fisher".

    Args:
        model: any model with attention; unchanged.
        batches: model inputs with labels, as for `head_importance`. Where `torch.distributed` runs several processes,
            each gives its share, and all get the gradients of all examples, process after process.
        labels: "given", or "predicted" for the model's own answers.

    Returns:
        `(num_examples, num_layers, num_heads)`, float32, in the loss's unit, at xi = 1: negative where the loss rises
        as the head is turned down. NaN marks places without a head. Examples without a label that counts are left out.

    Raises:
        TypeError, ValueError: as `head_importance` with method "gradient".
    """
    choice(labels, "labels", LABELS)
    layers = scored_layers(model)
    places = max(layer.num_heads for layer in layers)
    rows = [torch.zeros(0, len(layers), places)]
    for batch in example_gradients(model, layers, batches, labels=labels, description="gradients"):
        found = torch.full((len(batch[0]), len(layers), places), torch.nan)
        for index, (layer, gradient) in enumerate(zip(layers, batch, strict=True)):
            found[:, index, : len(layer.heads)] = gradient.sum((1, 2))[:, : len(layer.heads)].float().cpu()
        rows.append(found)
    gradients = from_processes(torch.cat(rows))
    if not len(gradients):
        raise ValueError(NO_LABELS)
    heads = [gradients[:, index, : len(layer.heads)] for index, layer in enumerate(layers)]
    all_finite(layers, heads, "gradients of the loss by the heads' gates")
    return gradients
