"""Sensitivity of the loss to a gate on the head (Michel et al. 2019, arXiv 1905.10650)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.gates import sum_over_examples
from hf_attnkit.importance.loss import check_labels as check  # noqa: F401 - the method's options
from hf_attnkit.models.layers import AttentionLayer


def score(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: str = "given",
) -> list[Tensor]:
    """E_x |dL(x) / dxi_h|, the mean over examples; xi_h = 1 multiplies the head's output at all tokens of x.

    The absolute value is of each example and not of a batch, so batches do not matter.

    Args:
        labels: see `loss.with_labels`.

    Returns:
        For each layer `(num_heads,)`, float32, at least 0, in the loss's unit (nats for cross-entropy): to first order
        how much an example's loss changes if the head is removed.
    """
    sums, number = sum_over_examples(
        model, layers, batches, lambda gradient: gradient.sum((1, 2)).abs(), labels=labels, description="gradient"
    )
    return [(total / number).float() for total in sums]
