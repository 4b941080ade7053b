"""Diagonal Fisher information of a gate on the head (Kwon et al. 2022, arXiv 2204.09656)."""

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
    """sum_x (dL(x) / dxi_h)^2 over examples; xi_h = 1 multiplies the head's output at all tokens of x.

    Args:
        labels: see `loss.with_labels`.

    Returns:
        For each layer `(num_heads,)`, float32, at least 0, in squared units of the loss; grows with the number of
        examples.
    """
    sums, _ = sum_over_examples(
        model, layers, batches, lambda gradient: gradient.sum((1, 2)).square(), labels=labels, description="fisher"
    )
    return [total.float() for total in sums]
