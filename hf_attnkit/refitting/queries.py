"""Fit a layer's query projection after its keys changed: `attention_match` on what the running model shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.mask import Mask
from hf_attnkit.editing import projections
from hf_attnkit.models.layers import AttentionLayer, weight_of
from hf_attnkit.observing.attention_calls import has_softmax, shown
from hf_attnkit.observing.batches import real_mask
from hf_attnkit.observing.walk import Walk
from hf_attnkit.refitting.attention_match import Batch, fit_queries


@dataclass(frozen=True)
class Attended:
    """One attention call.

    Attributes:
        query, key: `(B, H, T, d)` and `(B, G, T, d)`, as they enter the scores.
        mask: which keys are seen.
        scaling: of the scores.
        output: `(B, T, M)`, what the layer's output projection gives for it.
    """

    query: Tensor
    key: Tensor
    mask: Mask
    scaling: float
    output: Tensor

    def in_order(self, order: Sequence[int]) -> Attended:
        """With these key heads, and the query heads of each, in this order."""
        query = self.query.unflatten(1, (self.key.shape[1], -1))[:, list(order)].flatten(1, 2)
        return replace(self, query=query, key=self.key[:, list(order)])


def can_fit_queries(layer: AttentionLayer) -> bool:
    """Whether queries are a linear map of the layer's input, rotated, and attention is a softmax of their products.

    There is no cap of the scores, no sink, no bias head by head; keys are not repeated before they are attended to, and
    there is one call in a forward pass.
    """
    if layer.norm or layer.is_cross or not has_softmax(layer.module):
        return False
    attention = layer.attention
    return not (
        layer.query is None
        or "query" in layer.problems
        or attention.softcap is not None
        or attention.has_sinks
        or attention.position_bias
        or not attention.calls_interface
        or attention.calls * attention.calls_per_forward > 1
        or attention.num_key_value_heads != layer.num_key_value_heads
    )


class NotLinearError(RuntimeError):
    """Queries are not what their projection and the rotary embedding make them."""


@contextmanager
def attention_at(
    model: PreTrainedModel, layer: AttentionLayer, stock: Sequence[AttentionLayer]
) -> Iterator[Callable[[Walk], Attended]]:
    """A function that runs a batch as far as this layer and returns the layer's attention call; for the block only.

    Args:
        stock: of the model, as of `require_shown`.
    """
    calls: list[tuple[Tensor, Tensor, Mask, float]] = []

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        if module is layer.module:
            if mask.softcap is not None or mask.sinks is not None:
                raise ValueError(
                    f"layer {layer.index}: its scores are capped or its softmax has learned sinks, so queries cannot "
                    "be fitted; give refit='output'"
                )
            calls.append((query, key, mask, scaling))

    def run(walk: Walk) -> Attended:
        calls.clear()
        output = walk.seen(layer.index, layer.output).output
        return Attended(*calls[0], output)

    with shown(model, stock), observe(note):
        yield run


@dataclass(frozen=True)
class Watched:
    """One batch of a layer's query fit.

    Attributes:
        walk, inputs: of the changed model.
        call: the untouched model's.
        weight: `(B, T)`, what each token counts; padding not yet left out. `None`: all alike.
        aside: bool `(B, T)`, the tokens that the fit does not look at; `None`: none.
    """

    walk: Walk
    inputs: Mapping[str, Any]
    call: Attended
    weight: Tensor | None = None
    aside: Tensor | None = None


def fit_layer_queries(
    model: PreTrainedModel,
    layer: AttentionLayer,
    stock: Sequence[AttentionLayer],
    batches: Sequence[Watched],
    steps: int,
) -> tuple[float, float]:
    """Change the layer's query projection so that it attends as the untouched model's calls do.

    Args:
        stock: as `attention_at`.
        steps: as `fit_queries`.

    Returns:
        Mean KL divergence in nats from the untouched model's attention, over heads and tokens by what these count,
        before and after; of tokens set aside where there are some.

    Raises:
        NotLinearError: if the model's queries are not what the projection and the rotary embedding make them.
        ValueError: for activations that are not finite.
    """
    weight, bias = weight_of(layer.query), None if layer.query.bias is None else layer.query.bias.detach()
    rows = layer.rows("query")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    stacked = weight[rows] if bias is None else torch.cat([weight[rows], bias[rows, None]], dim=1)
    present = stacked.to(dtype).unflatten(0, (-1, layer.head_dim))
    with attention_at(model, layer, stock) as run:
        made = [_batch(layer, run, each, present) for each in batches]
    fitted, before, after = fit_queries(present, made, steps)
    if not (fitted.isfinite().all() and before.isfinite().all()):
        raise _not_finite(layer)
    fitted = fitted.flatten(0, 1)
    new_bias = None if bias is None else fitted[:, -1].to(bias.dtype)
    new_weight = (fitted if bias is None else fitted[:, :-1]).to(weight.dtype)
    [edit] = projections.whole([projections.Edit(layer.query, new_weight, new_bias, rows)])
    projections.apply(edit)
    return float(before.mean()), float(after.mean())


def _batch(layer: AttentionLayer, run: Callable[[Walk], Attended], watched: Watched, present: Tensor) -> Batch:
    """What the fit looks at in one batch, proven to be what the model computes.

    Args:
        present: `(H, d, m)`, the query projection, its bias as the last column.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[:] = [args[0]]

    handle = layer.query.register_forward_pre_hook(note)
    try:
        call, target = run(watched.walk), watched.call
    finally:
        handle.remove()
    if not (call.query.isfinite().all() and target.query.isfinite().all()):
        raise _not_finite(layer)
    dtype, x = present.dtype, seen[0].to(present.dtype)
    if layer.query.bias is not None:
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
    counts = real_mask(x, watched.inputs, layer.padding, layer.of_length).to(dtype)
    if watched.weight is not None:
        counts = counts * watched.weight.to(counts)
    aside = None if watched.aside is None else watched.aside.to(counts)
    made = Batch(
        x, call.key.to(dtype), target.query.to(dtype), target.key.to(dtype), call.mask, call.scaling,
        counts if aside is None else counts * (1 - aside), layer.rope, _rotation(layer, run, watched.walk, dtype),
        None if aside is None else counts * aside,
    )  # fmt: skip
    factor = _factor(layer, made.query(present), call.query)
    if factor != 1:
        made = replace(made, target_query=made.target_query / factor, scaling=made.scaling * factor)
    _require_linear(layer, factor * made.query(present), call.query)
    return made


def _not_finite(layer: AttentionLayer) -> ValueError:
    return ValueError(
        f"layer {layer.index}: attention scores contain NaN or infinity; run the model in bfloat16 or float32 and look "
        "for a batch that breaks it"
    )


def _rotation(layer: AttentionLayer, run: Callable[[Walk], Attended], walk: Walk, dtype: torch.dtype) -> Tensor | None:
    """What the model multiplies each pair of a query by, `(B, T, pairs)`: read from it with queries of 1 + 0i."""
    if layer.rope is None:
        return None
    first, second = layer.rope.pairs()
    one = torch.zeros(layer.num_heads, layer.head_dim)
    one[:, first] = 1

    def give(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[..., layer.rows("query")] = one.flatten().to(output)
        return output

    handle = layer.query.register_forward_hook(give)
    try:
        turned = run(walk).query[:, 0].to(dtype)
    finally:
        handle.remove()
    return torch.complex(turned[..., first], turned[..., second])


def _factor(layer: AttentionLayer, expected: Tensor, query: Tensor) -> float:
    """What a module multiplies all queries by before it attends (Whisper: the scaling), 1 where it does not."""
    expected = expected.double()
    factor = float((expected * query).sum() / expected.square().sum().clamp(min=1e-300))
    return 1.0 if abs(factor - 1) < 1e-2 else factor


def _require_linear(layer: AttentionLayer, expected: Tensor, query: Tensor) -> None:
    """The proof that what is fitted is what the model computes: its own queries, again."""
    error = (expected - query.to(expected)).abs().max()
    # Rounding of the projection's output, of cosine, sine and their products, in the model's precision; and that of a
    # long dot product in float32, in which some families rotate whatever the model's precision.
    bound = 2**3 * torch.finfo(query.dtype).eps + 2**6 * torch.finfo(torch.float32).eps
    if not error <= bound * expected.abs().max():
        raise NotLinearError(
            f"layer {layer.index}: the queries that enter the scores differ by {error:.2g} from projection and rotary "
            "embedding, so something is between them that is not known; give refit='output'"
        )
