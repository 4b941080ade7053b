"""Entropy joined with a score of what the head does: entropy alone tells where a head looks, not whether it matters.

"hies" follows the idea of HIES (Choi et al. 2025, arXiv 2510.13832), which joins gradient and entropy linearly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.importance.loss import check_labels
from hf_attnkit.importance.methods import contribution, entropy, gradient
from hf_attnkit.models.layers import AttentionLayer

JOINTS = ("product", "hies")
ALPHA = 0.9


def check(*, joint: str = "product", alpha: float | None = None, labels: str | None = None) -> None:
    """Raises `ValueError` for an unknown `joint`, an `alpha` outside [0, 1], or options of "hies" without it."""
    if joint not in JOINTS:
        raise ValueError(f"joint={joint!r} is unknown; it must be one of {', '.join(JOINTS)}")
    if joint != "hies" and (alpha is not None or labels is not None):
        raise ValueError(f"alpha and labels belong to joint='hies'; joint={joint!r} has no gradient")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1):
        raise ValueError(f"alpha={alpha!r} must be from 0 (entropy only) to 1 (gradient only)")
    if labels is not None:
        check_labels(labels)


def score(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    *,
    joint: str = "product",
    alpha: float | None = None,
    labels: str | None = None,
) -> list[Tensor]:
    """Focus is 1 - entropy / ln(number of visible keys), of a head's mean normalised entropy.

    Args:
        joint: "product" is focus * `contribution`, without labels. "hies" is alpha * gradient + (1 - alpha) * focus,
            both shifted and scaled to [0, 1] over all heads of the model.
        alpha: share of the gradient in "hies", 0.9 by default.
        labels: of the gradient in "hies", "given" by default; "predicted" makes a score without labels. See
            `loss.with_labels`.

    Returns:
        For each layer `(num_heads,)`, float32: units of the residual stream, or a number in [0, 1] for "hies".
    """
    kept = list(batches)
    focus = [1 - diffuse for diffuse in entropy.score(model, layers, kept, direction="diffuse")]
    if joint == "product":
        return [f * c for f, c in zip(focus, contribution.score(model, layers, kept), strict=True)]
    share = ALPHA if alpha is None else alpha
    gradients = gradient.score(model, layers, kept, labels=labels or "given")
    return [share * g + (1 - share) * f for g, f in zip(_from_0_to_1(gradients), _from_0_to_1(focus), strict=True)]


def _from_0_to_1(scores: list[Tensor]) -> list[Tensor]:
    """All equal scores become 0."""
    low, high = torch.cat(scores).aminmax()
    return [(score - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny) for score in scores]
