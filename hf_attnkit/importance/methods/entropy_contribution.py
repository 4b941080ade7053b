"""Entropy joined with a score of what the head does: entropy alone tells where a head looks, not whether it matters.

"hies" follows the idea of HIES (Choi et al. 2025, arXiv 2510.13832), which joins gradient and entropy linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import choice, fraction
from hf_attnkit.importance.methods.contribution import Contribution
from hf_attnkit.importance.methods.entropy import Entropy
from hf_attnkit.importance.methods.gradient import Gradient
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer

ALPHA = 0.9


@dataclass(frozen=True)
class EntropyContribution(Score):
    """Focus is 1 - entropy / ln(number of visible keys), of a head's mean normalised entropy.

    In units of the residual stream, or from 0 to 1 for "hies".

    Attributes:
        joint: "product" is focus * `contribution`, without labels. "hies" is alpha * gradient + (1 - alpha) * focus,
            both shifted and scaled to [0, 1] over all heads of the model.
        alpha: share of the gradient in "hies", 0.9 by default.
        labels: of the gradient in "hies", "given" by default; "predicted" makes a score without labels. See
            `loss.with_labels`.
    """

    name = "entropy_contribution"

    joint: str = "product"
    alpha: float | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        choice(self.joint, "joint", ("product", "hies"))
        if self.joint != "hies" and (self.alpha is not None or self.labels is not None):
            raise ValueError(f"alpha and labels belong to joint='hies'; joint={self.joint!r} has no gradient")
        if self.alpha is not None:
            fraction(self.alpha, "alpha", why="0 is entropy only, 1 is gradient only")
        self._gradient()

    def _gradient(self) -> Gradient:
        return Gradient("given" if self.labels is None else self.labels)

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        kept = list(batches)
        focus = [1 - diffuse for diffuse in Entropy(direction="diffuse").score(model, layers, kept)]
        if self.joint == "product":
            return [f * c for f, c in zip(focus, Contribution().score(model, layers, kept), strict=True)]
        share = ALPHA if self.alpha is None else self.alpha
        gradients = self._gradient().score(model, layers, kept)
        return [share * g + (1 - share) * f for g, f in zip(_from_0_to_1(gradients), _from_0_to_1(focus), strict=True)]


def _from_0_to_1(scores: list[Tensor]) -> list[Tensor]:
    """All equal scores become 0."""
    low, high = torch.cat(scores).aminmax()
    return [(score - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny) for score in scores]
