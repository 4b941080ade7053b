"""What each attention head looks at: entropy, confidence, distance, shares, redundancy.

Confidence is that of Voita et al. 2019 (arXiv 1905.09418), who tell positional, syntactic and rare-word heads apart;
the shares on the neighbours, the first token and separators are those of Clark et al. 2019 (arXiv 1906.04341). For a
query i with attention p_i = softmax(s_i) over the keys j that it may see:

    entropy     -sum_j p_ij ln p_ij              first       p_i,first token
    confidence  max_j p_ij                       separator   sum of p_ij over separators j
    distance    sum_j p_ij |i - j|               redundancy  sum_j min(p_ij of one head, p_ij of another)
    previous    p_i,i-1      next  p_i,i+1

A learned sink (gpt-oss) is one more key: its weight and those of the tokens sum to one. It has no place in the
sequence, so distance is a mean over the tokens, with weights that sum to one without it, and no share counts it.

Each is a mean over queries. Heads are compared on the same query, so the attention of all heads of one layer is in
memory for one block of queries at a time: at most `BLOCK_NUMBERS` numbers, never a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.checks import integer
from hf_attnkit.common.state import plain_mode
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.attention_calls import has_softmax, real_queries, visible_attention
from hf_attnkit.observing.batches import run_batches

BLOCK_NUMBERS = 2**22  # 16 MiB of float32
SHARES = ("previous", "next", "first", "separator")
MEANS = ("entropy", "confidence", "distance", *SHARES)


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics of every head, each `(num_layers, num_heads)`, float32.

    Means over all tokens of all batches. Padding does not count, nor do queries that see a single key, which have no
    choice. NaN where a layer has fewer heads, where a layer's attention is no softmax ("linear"), and where
    no query sees such a token (the next one in a causal model).

    Attributes:
        entropy: nats; 0 is one key, ln(number of visible keys) is uniform.
        confidence: the largest attention weight of a query, in [0, 1]; higher = surer of one token.
        distance: how far away the attended tokens are, in tokens; 0 is the token itself. NaN in cross-attention. A
            learned sink is no token, so it does not count.
        previous, next: share of attention on the token before and after, in [0, 1], over queries that see it. NaN in
            cross-attention.
        first: share on the first token that is no padding, in a packed row on its document's, in [0, 1].
        separator: share on all separator tokens together, in [0, 1], over queries that see one.
        redundancy: overlap with the most similar other head of the layer, in [0, 1]: the share of attention that both
            place on the same tokens, and on a learned sink (1 less the total variation distance), 1 = a copy. NaN for a
            lone head.
        nearest_head: which head that is, int64; -1 where there is none.
    """

    entropy: Tensor
    confidence: Tensor
    distance: Tensor
    previous: Tensor
    next: Tensor
    first: Tensor
    separator: Tensor
    redundancy: Tensor
    nearest_head: Tensor

    def rows(self) -> list[dict[str, int | float | None]]:
        """One mapping per head that the model has and that attends by a softmax, `None` for NaN: ready for JSON."""
        values = {name: tensor.tolist() for name, tensor in asdict(self).items()}
        rows: list[dict[str, int | float | None]] = []
        for layer, head in (~self.entropy.isnan()).nonzero().tolist():
            row: dict[str, int | float | None] = {"layer": layer, "head": head}
            for name, table in values.items():
                value = table[layer][head]
                row[name] = None if value != value or (name == "nearest_head" and value < 0) else value
            rows.append(row)
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        titles = list(rows[0])
        cells = [[_cell(value) for value in row.values()] for row in rows]
        widths = [max(len(title), *(len(line[i]) for line in cells)) for i, title in enumerate(titles)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [titles, *cells]
        )


def _cell(value: int | float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


@plain_mode()
def head_statistics(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    separator_ids: int | Sequence[int] | None = None,
) -> HeadStatistics:
    """Statistics of what every head attends to.

    Args:
        model: any model with attention, whatever attention it runs; unchanged.
        batches: model inputs, such as a `DataLoader` gives; they are moved to the model's device.
        separator_ids: token ids of separators, such as `tokenizer.sep_token_id`. By default the config's
            `sep_token_id`, else its `eos_token_id`; where it has neither, or the batches hold no token ids, the column
            `separator` is NaN.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: no or empty batches, no query that sees two keys, scores that are not finite, separator ids that
            are no integers or for batches without token ids, a model that is not supported or has linear attention
            alone.
    """
    layers = attention_layers(model)
    looked_at = [layer for layer in layers if has_softmax(layer.module)]
    if not looked_at:
        raise ValueError(
            f"every layer of {type(model).__name__} runs linear attention, which has no attention weights; look at "
            "the model before the swap (hf_attnkit.restore_attention)"
        )
    ids = _separator_ids(model, separator_ids)
    sums = {id(layer.module): _Sums(layer) for layer in looked_at}
    inputs: dict[str, Any] = {}

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        if id(module) in sums:
            found = sums[id(module)]
            found.add(query, key, mask, scaling, inputs, _is_separator(model, found.layer, inputs, ids, key.shape[2]))

    with visible_attention(model), observe(note):
        for batch, run in run_batches(model, batches, description="head statistics"):
            inputs = batch
            if separator_ids is not None and "input_ids" not in batch:
                given = sorted(name for name, value in batch.items() if isinstance(value, Tensor))
                raise ValueError(f"separator_ids={separator_ids!r} need batches with input_ids; got {given}")
            run()
    shape = len(layers), max(layer.num_heads for layer in layers)
    tables = {name: torch.full(shape, torch.nan) for name in (*MEANS, "redundancy")}
    nearest = torch.full(shape, -1)
    for found in sums.values():
        row, heads = found.layer.index, slice(0, found.layer.num_heads)
        if found.layer.is_empty:  # its one head is a stand-in
            continue
        for name, mean in found.means().items():
            tables[name][row, heads] = mean.float()
        if found.layer.num_heads > 1:
            overlap, nearest[row, heads] = found.overlap().fill_diagonal_(-torch.inf).max(-1)
            tables["redundancy"][row, heads] = overlap.float()
    return HeadStatistics(**tables, nearest_head=nearest)


def _separator_ids(model: PreTrainedModel, given: int | Sequence[int] | None) -> list[int]:
    found = given
    if found is None:
        found = getattr(model.config, "sep_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    ids = [] if found is None else list(found) if isinstance(found, Sequence) else [found]
    return [integer(number, "separator_ids", why="a token id, such as tokenizer.sep_token_id") for number in ids]


def _is_separator(
    model: PreTrainedModel, layer: AttentionLayer, inputs: Mapping[str, Any], ids: Sequence[int], length: int
) -> Tensor | None:
    """Which keys are separators, bool `(B, K)`; `None` where that cannot be known."""
    is_target = model.config.is_encoder_decoder and getattr(layer.module, "is_decoder", False) and not layer.is_cross
    tokens = inputs.get("decoder_input_ids" if is_target else "input_ids")
    if not ids or tokens is None or tokens.shape[-1] != length:
        return None
    # A choice among several texts has them along an axis of its own, which the model folds into the batch.
    return torch.isin(tokens.flatten(0, -2), torch.tensor(ids, device=tokens.device))


class _Sums:
    """Running sums over queries for the heads of one layer, in float64."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer = layer
        self._totals = {name: torch.zeros(layer.num_heads, dtype=torch.float64) for name in MEANS}
        self._counts = {name: torch.zeros(layer.num_heads, dtype=torch.float64) for name in MEANS}
        # Sum over queries of the L1 distance of two heads' attention, and how many queries that were.
        self._apart = torch.zeros(layer.num_heads, layer.num_heads, dtype=torch.float64)
        self._compared = 0.0

    def add(
        self,
        query: Tensor,
        key: Tensor,
        mask: Mask,
        scaling: float,
        inputs: Mapping[str, Any],
        separator: Tensor | None,
    ) -> None:
        """Add one attention call. Shapes as in `Kind.attention`; `separator` `(B, K)`."""
        batch, num_heads, q_length, _ = query.shape
        real = real_queries(self.layer, mask, inputs)
        real = torch.ones(1, q_length, dtype=torch.bool, device=query.device) if real is None else real
        real_keys = self._real_keys(mask, real)
        rank = real_keys.cumsum(-1) - 1  # place among the tokens that are no padding
        first = rank == 0 if self.layer.is_cross else mask.key_position == mask.first_tokens()
        block = max(1, BLOCK_NUMBERS // (batch * num_heads * key.shape[2]))
        for queries, scores, visible in masked_scores(query, key, mask, scaling, block):
            shown = real_keys[:, None, None, :] if visible is None else visible & real_keys[:, None, None, :]
            own = real[:, None, queries] & (shown.sum(-1) > (1 if mask.sinks is None else 0))
            p, sink = weights_and_sink(scores, shown, mask.sinks)
            every = p if sink is None else torch.cat([p, sink], -1)
            self._add("entropy", torch.special.entr(every).sum(-1), own)
            self._add("confidence", every.amax(-1), own)
            marks = {"first": first[:, None, None, :]}
            if separator is not None:
                marks["separator"] = separator[:, None, None, :]
            if not self.layer.is_cross:
                ahead = rank[:, None, None, :] - rank[:, None, queries, None]
                among = p if sink is None else scores.softmax(-1).masked_fill(~shown, 0.0)
                self._add("distance", (among * ahead.abs()).sum(-1), own)
                marks |= {"previous": ahead == -1, "next": ahead == 1}
            for name, marked in marks.items():
                marked = marked & shown
                self._add(name, (p * marked).sum(-1), own & marked.any(-1))
            if num_heads > 1:
                self._compare(every, own.expand(batch, -1, -1).all(1))

    def _real_keys(self, mask: Mask, real: Tensor) -> Tensor:
        if not self.layer.is_cross:
            return real
        seen = mask.key_visible if mask.dense is None else mask.dense.any(-2)[:, 0]
        return torch.ones_like(mask.key_position, dtype=torch.bool) if seen is None else seen

    def _add(self, name: str, values: Tensor, counted: Tensor) -> None:
        """`values` `(B, H, q)`, of which those `counted` (bool, broadcastable) are of queries that count."""
        self._totals[name] += values.masked_fill(~counted, 0.0).sum((0, 2)).double().cpu()
        self._counts[name] += counted.expand_as(values).sum((0, 2)).cpu()

    def _compare(self, p: Tensor, counted: Tensor) -> None:
        """`p` `(B, H, q, K)`, `counted` `(B, q)`."""
        heads = p.transpose(1, 2)[counted]  # (queries, H, K)
        self._apart += torch.cdist(heads, heads, p=1.0).sum(0).double().cpu()
        self._compared += len(heads)

    def means(self) -> dict[str, Tensor]:
        """`(num_heads,)` each; NaN where no query counts.

        Raises:
            ValueError: if no query of the layer counts, or scores were not finite.
        """
        if not self._counts["entropy"].all():
            raise ValueError(
                f"{self.layer.name}: no query of the batches sees two keys, so no head has a choice; give sequences of "
                "at least two tokens"
            )
        if not self._totals["entropy"].isfinite().all():
            raise ValueError(
                f"{self.layer.name}: attention scores contain NaN or infinity; run the model in bfloat16 or float32 "
                "and look for a batch that breaks it"
            )
        return {name: total / self._counts[name] for name, total in self._totals.items()}

    def overlap(self) -> Tensor:
        """`(num_heads, num_heads)`: the share of attention that two heads place on the same tokens."""
        return 1 - self._apart / 2 / self._compared


def weights_and_sink(scores: Tensor, shown: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights of the keys `(B, H, q, K)`, and those of the sink `(B, H, q, 1)`, where there is one."""
    if sinks is None:
        return scores.softmax(-1).masked_fill(~shown, 0.0), None
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)
    return weights[..., :-1].masked_fill(~shown, 0.0), weights[..., -1:]


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
        scores = mask.capped((stacked @ keys).view(batch, num_heads, -1, key.shape[2]))
        if mask.bias is not None:
            scores = scores + mask.bias[..., queries if mask.bias.shape[-2] > 1 else slice(None), :]
        visible = mask.visible(queries)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
        yield queries, scores, visible
