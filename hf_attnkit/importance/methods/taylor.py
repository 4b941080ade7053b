"""First-order Taylor expansion of removing a head, token by token (Molchanov et al. 2017, arXiv 1611.06440)."""

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
    """E_x sum_t |a_th . dL(x) / da_th|, the mean over examples; a_th is the head's output at the real token t.

    Each term is to first order the change of the loss if the head is removed at that token only. Their plain sum is
    dL/dxi_h, so with the absolute value outside the sum, as Molchanov et al. have it, this would be `gradient`; inside,
    tokens at which the head helps do not cancel those at which it harms, and the score is at least that of `gradient`.

    Args:
        labels: see `loss.with_labels`.

    Returns:
        For each layer `(num_heads,)`, float32, at least 0, in the loss's unit.
    """
    sums, number = sum_over_examples(
        model, layers, batches, lambda gradient: gradient.abs().sum((1, 2)), labels=labels, per_token=True,
        description="taylor",
    )  # fmt: skip
    return [(total / number).float() for total in sums]
