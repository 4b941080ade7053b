"""Run a model once and make the attention maps of every example, from the calls as they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.analysis.view.blockwise import Units, add_up
from hf_attnkit.analysis.view.images import require_proportions
from hf_attnkit.analysis.view.maps import AttentionMap, Example, Sequence
from hf_attnkit.analysis.view.sequences import Labels, Place, keys_of, patch_labels, shown_pixels, stack_of
from hf_attnkit.attention.dispatch import observe
from hf_attnkit.attention.kind import ATTRIBUTE, Kind, Stock
from hf_attnkit.attention.kinds.streaming_heads import StreamingHeadsAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.models.layers import AttentionLayer, attention_layers
from hf_attnkit.observing.attention_calls import has_softmax, real_queries, visible_attention
from hf_attnkit.observing.batches import spare_options, to_device

POOLED_UNITS = 64  # rows and columns of a pooled map, at most
LINKS = 2**21  # of all heads of an example together; at least one for each query that is shown
LINKS_OF_A_QUERY = 8
LONGEST_LINKED = 4096  # queries whose links are kept; of more, every second, third, ...


@dataclass
class _Row:
    """An example while it is made."""

    places: list[tuple[Place, Tensor]] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)


def collect(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    tokenizer: Any = None,
    images: list[Tensor] | None = None,
    *,
    count: int,
    exact_tokens: int,
) -> list[Example]:
    """The examples of a batch.

    Args:
        images: what the patches are of, one for each image of the batch.
        count: of examples.
        exact_tokens: up to how many tokens of a call's queries or keys a map is of tokens, not of blocks.

    Raises:
        TypeError, ValueError: as `attention_view`.
    """
    layers = attention_layers(model)
    collector = _Collector(layers, count, exact_tokens, images)
    with visible_attention(model), observe(collector.observe):
        batch = to_device(inputs, model)
        collector.start(batch, Labels(model, batch, tokenizer))
        with torch.no_grad(), evaluation_mode(model):
            model(**(batch | spare_options(model)))
    return [Example(tuple(row.sequences), tuple(row.maps)) for row in collector.rows]


class _Collector:
    def __init__(
        self, layers: list[AttentionLayer], count: int, exact_tokens: int, images: list[Tensor] | None
    ) -> None:
        self._layers = {id(layer.module): layer for layer in layers}
        self._heads = sum(layer.num_heads * layer.attention.calls for layer in layers)
        self._exact, self._images = exact_tokens, images
        self.rows = [_Row() for _ in range(count)]

    def start(self, inputs: Mapping[str, Any], labels: Labels) -> None:
        self._inputs, self._labels = inputs, labels
        self._known: list[Place] = []
        self._calls: dict[int, int] = {}

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        layer = self._layers.get(id(module))
        if layer is None:
            return
        call = self._calls[layer.index] = self._calls.get(layer.index, -1) + 1
        own = Place(stack_of(layer.attention.path), query.shape[2])
        other = keys_of(layer, own, key.shape[2], self._known)
        self._known += [place for place in (own, other) if place not in self._known]
        real = real_queries(layer, mask, self._inputs)
        real = torch.ones(1, own.length, dtype=torch.bool) if real is None else real.cpu()
        seen = _real_keys(mask).cpu() if other is not own else real
        batch = query.shape[0]
        for number, row in enumerate(self.rows):
            # As many texts as images, several parts of one image, or one for all.
            place = number * (batch // len(self.rows)) if batch >= len(self.rows) else min(number, batch - 1)
            common = self._common(layer, call, row, place, (own, real), (other, seen))
            if layer.is_empty:
                row.maps.append(AttentionMap(**common, missing="no head is left"))
            elif not has_softmax(module):
                row.maps.append(AttentionMap(**common, missing="linear attention has no attention weights"))
            else:
                row.maps.append(self._map(common, row, place, query, key, mask, scaling))

    def _common(
        self, layer: AttentionLayer, call: int, row: _Row, place: int, own: tuple[Place, Tensor],
        other: tuple[Place, Tensor],
    ) -> dict[str, Any]:  # fmt: skip
        kind = getattr(layer.module, ATTRIBUTE, None)
        streaming: tuple[int, ...] = ()
        if isinstance(kind, StreamingHeadsAttention):
            streaming = tuple(head for head in layer.heads if head // layer.group_size in kind.heads)
        queries = self._sequence(row, place, *own)
        return {
            "layer": layer.index, "call": call,
            "name": layer.name + (f", call {call}" if layer.attention.calls > 1 else ""),
            "kind": kind.name if isinstance(kind, Stock) else str(kind) if isinstance(kind, Kind) else "",
            "queries": queries, "keys": queries if other is own else self._sequence(row, place, *other),
            "is_cross": layer.is_cross, "num_key_value_heads": 0 if layer.is_empty else layer.num_key_value_heads,
            "streaming": streaming,
        }  # fmt: skip

    def _sequence(self, row: _Row, place: int, where: Place, real: Tensor) -> int:
        """The number of a sequence of an example, which is made if need be."""
        for number, (known, _) in enumerate(row.places):
            if known == where:
                return number
        own = real[min(place, len(real) - 1)]
        labels, is_text = self._labels.of(where, place, own)
        grid, pixels, picture = self._labels.grid(where), self._labels.pixels(where), None
        if grid is not None and pixels is not None:
            labels = patch_labels(grid, len(labels))
            number = min(place, len(pixels) - 1)
            picture = shown_pixels(pixels[number])
            if self._images is not None:
                picture = self._images[number]
                require_proportions(picture, pixels)
        block = 1 if len(labels) <= self._exact else -(-len(labels) // POOLED_UNITS)
        row.places.append((where, own))
        row.sequences.append(Sequence(where.stack, labels, is_text, block, grid if block == 1 else None, picture))
        return len(row.sequences) - 1

    def _map(
        self, common: dict[str, Any], row: _Row, place: int, query: Tensor, key: Tensor, mask: Mask, scaling: float
    ) -> AttentionMap:
        queries, keys = row.sequences[common["queries"]], row.sequences[common["keys"]]
        number = len(queries.labels)
        links, stride = 0, 1
        if queries.block > 1 or keys.block > 1:
            stride = -(-number // LONGEST_LINKED)
            links = min(LINKS_OF_A_QUERY, max(1, LINKS // (self._heads * -(-number // stride))))
        units = Units(
            place, row.places[common["queries"]][1], row.places[common["keys"]][1], queries.block, keys.block, links,
            stride,
        )  # fmt: skip
        try:
            sums = add_up(query, key, mask, scaling, common["is_cross"], units)
        except ValueError as error:
            raise ValueError(f"{common['name']}: {error}") from error
        weights, sink, visible = sums.map()
        found: dict[str, Any] = {"weights": weights, "sink": sink, "visible": visible, "links": sums.links()}
        return AttentionMap(**common, **found | sums.statistics())


def _real_keys(mask: Mask) -> Tensor:
    """Which keys some query sees, `(1 or B, K)`."""
    seen = mask.key_visible if mask.dense is None else mask.dense.any(-2).any(1)
    return torch.ones(1, mask.key_position.shape[1], dtype=torch.bool) if seen is None else seen
