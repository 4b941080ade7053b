"""Rearrange which heads of a layer are removed: the second step of Kwon et al. 2022's mask search (arXiv 2204.09656).

With a gate m_h on each head's output and g_n = dL_n / dm the gradients of example n at m = 1, the loss rises by about

    1/2 (1 - m)^T F (1 - m),     F = mean over n of g_n g_n^T

The first step takes only the diagonal of F, which is `select_heads` of the Fisher score. It misses that two heads can
do the same work (removing both costs more than the scores say) or opposite work. So within each layer, removed and
kept heads then change places as long as that lowers the layer's own block of the form. Layers that must lose the same
heads change places together, by the sum of their blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.pruning.select import checked_heads, group_size, groups_per_layer, heads_in, layers_together


@plain_mode()
def rearrange_heads(
    gradients: Tensor,
    heads: Mapping[int, Iterable[int]],
    *,
    model: PreTrainedModel | None = None,
    num_key_value_heads: int | Sequence[int] | None = None,
) -> dict[int, list[int]]:
    """A selection with as many heads in each layer, and in grouped layers of the same kind, that costs less.

        gradients = head_gradients(model, batches)
        selection = select_heads(gradients.square().sum(0), fraction=0.5)
        selection = rearrange_heads(gradients, selection)

    Args:
        gradients: `(num_examples, num_layers, num_heads)`, as from `head_gradients`: of each example's loss with
            respect to a gate on each head's output; NaN marks places without a head.
        heads: `{layer: [head, ...]}` to remove, as from `select_heads`.
        model: the model of the gradients; which query heads share key/value heads is read from it. Heads then
            change places with heads of their group, and groups with groups.
        num_key_value_heads: the same without the model: the number of key/value heads (per layer, if they differ).

    Returns:
        `{layer: [head, ...]}`, sorted. No exchange of two would lower `(1 - m)^T F (1 - m)` of a layer any more.

    Raises:
        TypeError, ValueError: for a bad shape or value, gradients of another model, or heads that are not there.
    """
    if not isinstance(gradients, Tensor):
        raise TypeError(
            f"gradients is a {type(gradients).__name__}; it must be a tensor (num_examples, num_layers, num_heads)"
        )
    if gradients.dim() != 3 or not len(gradients):
        raise ValueError(
            f"gradients has shape {tuple(gradients.shape)}; it must be (num_examples, num_layers, num_heads), one "
            "gradient per example and head and not their sum, with at least one example"
        )
    if gradients.isinf().any():
        raise ValueError("gradients contains infinity; look for an example that breaks the model, or use float32")
    gradients = gradients.double().cpu()
    counts = []
    for layer, rows in enumerate(gradients.unbind(1)):
        counts.append(heads_in(rows[0], f"layer {layer}: gradients of example 0"))
        if (rows.isnan() != rows[0].isnan()).any():
            raise ValueError(f"layer {layer}: gradients has NaN in other places for some examples than for the first")
    removed = checked_heads(heads, counts)
    found: dict[int, list[int]] = {}
    numbers = groups_per_layer(num_key_value_heads, counts, model=model, what="gradients")
    for layers in layers_together(model, counts):
        chosen = [sorted(removed.get(layer, ())) for layer in layers]
        if any(heads != chosen[0] for heads in chosen):
            raise ValueError(f"layers {list(layers)} share a bias of the scores and must lose the same heads: {chosen}")
        if not chosen[0]:
            continue
        count = counts[layers[0]]
        size = max(group_size(layer, count, numbers[layer]) for layer in layers)
        blocks = [gradients[:, layer, :count] for layer in layers]
        mask = torch.zeros(count, dtype=torch.double)
        mask[chosen[0]] = 1
        fisher = torch.stack([rows.T @ rows / len(rows) for rows in blocks]).sum(0)
        found |= dict.fromkeys(layers, _descend(fisher, mask, size).nonzero().flatten().tolist())
    return dict(sorted(found.items()))


def _descend(fisher: Tensor, removed: Tensor, size: int) -> Tensor:
    """The mask of removed heads `(num_heads,)`, after the best exchange each time until none lowers the form."""
    # Less than this is rounding, and an exchange could be taken back for ever.
    least = 1e-12 * fisher.diagonal().sum()
    while len(steps := _exchanges(removed, size)):
        # (z + d)^T F (z + d) - z^T F z
        gains = 2 * steps @ (fisher @ removed) + ((steps @ fisher) * steps).sum(1)
        best = int(gains.argmin())
        if gains[best] >= -least:
            break
        removed = removed + steps[best]
    return removed


def _exchanges(removed: Tensor, size: int) -> Tensor:
    """Changes of the mask `(number, num_heads)`: a removed and a kept head of a group, or a group without heads and one
    with, change places."""
    groups = removed.view(-1, size)
    steps = []
    for group, mask in enumerate(groups):
        for out in mask.nonzero().flatten().tolist():
            for kept in (1 - mask).nonzero().flatten().tolist():
                step = torch.zeros_like(groups)
                step[group, out], step[group, kept] = -1, 1
                steps.append(step.flatten())
    gone = groups.all(1)
    for empty in gone.nonzero().flatten().tolist():
        for other in (~gone).nonzero().flatten().tolist():
            step = torch.zeros_like(groups)
            step[empty], step[other] = groups[other] - groups[empty], groups[empty] - groups[other]
            steps.append(step.flatten())
    return torch.stack(steps) if steps else removed.new_zeros(0, len(removed))
