"""Attention entropy per head (Michel et al. 2019, arXiv 1905.10650; "bertology"), block by block.

For a query i with scaled scores s_ij over the keys it may see, p_i = softmax(s_i) and

    H_i = -sum_j p_ij ln p_ij = logsumexp_j(s_ij) - sum_j p_ij s_ij        in nats, 0 ln 0 = 0

so only a block of scores exists at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.mask import Mask
from ..families import AttentionLayer
from ..observe import observe_attention, real_queries

DIRECTIONS = ("focused", "diffuse")
BLOCK = 256


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
        is_causal: query i sees keys up to i; with more keys than queries, the last query stands at
            the last key.
        attention_mask: `(batch, key_length)`, nonzero for real tokens.
        normalize: divide by ln(number of visible keys), so that 1 is uniform whatever the length; a
            query with a single visible key gets 0.

    Returns:
        `(batch, num_heads, query_length)` in nats (or the fraction), float32 or better; 0 is one key,
        ln(number of visible keys) is uniform. A query without visible keys gets 0.

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
    return masked_entropy(query, key, mask, scaling, normalize)[0]


def masked_entropy(query: Tensor, key: Tensor, mask: Mask, scaling: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """`attention_entropy` under a `Mask`, and the number of keys that each query sees, `(B, 1 or H, Q)`."""
    blocks, counts = [], []
    for _, scores, visible in masked_scores(query, key, mask, scaling, BLOCK):
        if visible is not None:
            count = visible.sum(-1)
        else:
            count = torch.full((1, 1, scores.shape[2]), key.shape[2], device=key.device)
        counts.append(count.expand(-1, -1, scores.shape[2]))
        logsumexp = scores.logsumexp(-1)
        weights = torch.exp(scores - logsumexp[..., None])
        entropy = logsumexp - (weights * scores).sum(-1)
        entropy = entropy.masked_fill(count <= 1, 0.0).clamp(min=0.0)
        blocks.append(entropy / count.clamp(min=2).log() if normalize else entropy)
    return torch.cat(blocks, dim=-1), torch.cat(counts, dim=-1)


def masked_scores(
    query: Tensor, key: Tensor, mask: Mask, scaling: float, block: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The scores block by block: which queries, `(B, H, block, K)` in float32 or better, and which keys they see.

    The score of a hidden key is the dtype's minimum; `None` means that no key is hidden.
    """
    batch, num_heads, q_length, head_dim = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(dtype).transpose(-1, -2)
    for start in range(0, q_length, block):
        queries = slice(start, min(start + block, q_length))
        stacked = (query[:, :, queries].to(dtype) * scaling).reshape(batch, key.shape[1], -1, head_dim)
        scores = (stacked @ keys).view(batch, num_heads, -1, key.shape[2])
        if mask.bias is not None:
            scores = scores + mask.bias[..., queries if mask.bias.shape[-2] > 1 else slice(None), :]
        visible = mask.visible(queries)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
        yield queries, scores, visible


class EntropySums:
    """Sums entropy over the queries that are no padding, for each head: an observer of attention calls.

    Args:
        layers: other layers are not looked at.
        normalize: as of `attention_entropy`; a query that sees one key only counts nothing then.
        inputs: the batch, for layers whose queries and keys are of two sequences.
    """

    def __init__(
        self, layers: Sequence[AttentionLayer], normalize: bool, inputs: Mapping[str, Any] | None = None
    ) -> None:
        self._layers = {id(layer.module): layer for layer in layers}
        self._normalize, self._inputs = normalize, inputs or {}
        self._totals = {layer.index: torch.zeros(layer.num_heads, dtype=torch.float64) for layer in layers}
        self._counts = {layer.index: 0.0 for layer in layers}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float
    ) -> None:
        layer = self._layers.get(id(module))
        if layer is None:
            return
        entropy, visible_keys = masked_entropy(query, key, mask, scaling, self._normalize)
        real = (visible_keys[:, :1] >= (2 if self._normalize else 1)).float()
        own = real_queries(layer, mask, self._inputs)
        real = real if own is None else real * own[:, None]
        self._totals[layer.index] += (entropy * real).sum((0, 2)).double().cpu()
        self._counts[layer.index] += float(real.expand(query.shape[0], 1, query.shape[2]).sum())

    def means(self) -> list[Tensor]:
        """For each layer `(num_heads,)`, float64: nats, or the fraction.

        Raises:
            ValueError: if a layer had no query to look at.
        """
        if not all(self._counts.values()):
            raise ValueError(
                "no query of the batches sees enough keys to have an entropy; give sequences of at least two tokens"
            )
        return [total / self._counts[index] for index, total in self._totals.items()]


def check(*, direction: str = "focused", normalize: bool = True) -> None:
    """Raises `ValueError` for an unknown direction or a `normalize` that is no bool."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; it must be one of {', '.join(DIRECTIONS)}")
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize={normalize!r} must be True or False")


def score(
    model: PreTrainedModel,
    layers: list[AttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    *,
    direction: str = "focused",
    normalize: bool = True,
) -> list[Tensor]:
    """Mean entropy per head over all queries that are no padding.

    Args:
        direction: "focused" keeps heads of low entropy (score = -entropy), "diffuse" those of high
            entropy (score = entropy). The literature has not settled which are the ones to keep; the
            default is what measured better after recovery (docs/results.md).
        normalize: divide each query's entropy by ln(number of keys it may see), so that lengths and
            causal positions compare; a query that sees one key only counts nothing then.

    Returns:
        For each layer `(num_heads,)`, float32: nats, or a fraction if normalised; negated for "focused".
    """
    sums = EntropySums(layers, normalize)
    observe_attention(model, batches, sums, description="entropy")
    sign = 1.0 if direction == "diffuse" else -1.0
    return [sign * mean.float() for mean in sums.means()]
