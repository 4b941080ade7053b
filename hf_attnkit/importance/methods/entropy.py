"""Attention entropy per head (Michel et al. 2019, arXiv 1905.10650; "bertology"), without the attention matrix.

See `online` for how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.checks import choice
from hf_attnkit.importance.online import masked_entropy, visible_keys
from hf_attnkit.importance.queries import QuerySums
from hf_attnkit.importance.score import Batches, Score
from hf_attnkit.models.layers import AttentionLayer


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    is_causal: bool = False,
    attention_mask: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Entropy of each query's attention distribution, without keeping the attention matrix.

    Args:
        query: `(batch, num_heads, query_length, head_dim)`, after any rotary embedding.
        key: `(batch, num_key_value_heads, key_length, head_dim)`; heads are grouped, not repeated.
        scaling: factor of the scores; `head_dim ** -0.5` by default.
        is_causal: query i sees keys up to i; with more keys than queries, the last query is at
            the last key.
        attention_mask: `(batch, key_length)`, nonzero for real tokens.
        normalize: divide by ln(number of visible keys), so that 1 is uniform whatever the length; a
            query with a single visible key gets 0.

    Returns:
        `(batch, num_heads, query_length)` in nats (or the fraction), float32 or better; 0 is one key,
        ln(number of visible keys) is uniform. A query without visible keys gets 0. No gradient.

    Raises:
        ValueError: if the number of query heads is no multiple of that of key heads, or the mask's
            shape does not fit.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not divide into {key.shape[1]} key heads' groups")
    visible = None
    if attention_mask is not None:
        if attention_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be (batch, key_length) = "
                f"{(key.shape[0], key.shape[2])}"
            )
        visible = attention_mask.bool()
    mask = Mask.aligned(query.shape[2], key.shape[2], is_causal=is_causal, key_visible=visible, device=query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    entropy = masked_entropy(query, key, mask, scaling)
    return _share(entropy, mask, None) if normalize else entropy


def _share(entropy: Tensor, mask: Mask, window: int | None) -> Tensor:
    """Of the largest that a query's entropy could be, ln(number of keys it sees)."""
    return entropy / visible_keys(mask, window).clamp(min=2).to(entropy.dtype).log()


def entropy_sums(
    layers: Sequence[AttentionLayer], normalize: bool, inputs: Mapping[str, Any] | None = None
) -> QuerySums:
    """An observer that sums entropy for each head; arguments as `QuerySums` and `attention_entropy`."""

    def measure(query: Tensor, key: Tensor, mask: Mask, scaling: float, window: int | None) -> Tensor:
        entropy = masked_entropy(query, key, mask, scaling, window)
        return _share(entropy, mask, window) if normalize else entropy

    return QuerySums(layers, measure, fewest_keys=2 if normalize else 1, what="entropy", inputs=inputs)


@dataclass(frozen=True)
class Entropy(Score):
    """Mean entropy per head over all queries that are no padding: nats, or a fraction if normalised.

    Attributes:
        direction: "focused" keeps heads of low entropy (score = -entropy), "diffuse" those of high
            entropy (score = entropy). The literature has not settled which are the ones to keep; the
            default is what measured better on fine-tuned encoders with a refit (docs/results.md), where neither
            beats random heads. On a decoder "diffuse" measured far better: heads that rest on the first token count
            as focused.
        normalize: divide each query's entropy by ln(number of keys it may see), so that lengths and
            causal positions compare; a query that sees one key only counts nothing then. A learned sink is a key too:
            its weight and those of the keys sum to one.
    """

    name = "entropy"

    direction: str = "focused"
    normalize: bool = True

    def __post_init__(self) -> None:
        choice(self.direction, "direction", ("focused", "diffuse"))
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize={self.normalize!r} must be True or False")

    def score(self, model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Batches) -> list[Tensor]:
        sums = entropy_sums(layers, self.normalize)
        sums.look_at(model, batches)
        means = sums.means()
        return [(mean if self.direction == "diffuse" else -mean).float() for mean in means]
