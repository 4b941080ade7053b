"""`streaming_kinds`: from heads that were chosen to the mapping that `swap_attention` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_attnkit.attention.choose_kinds import Where
from hf_attnkit.attention.eight_bits import check_cache_dtype
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.kinds.streaming_heads import StreamingHeadsAttention
from hf_attnkit.common.checks import in_range
from hf_attnkit.models.layers import attention_layers


def streaming_kinds(
    heads: Mapping[int, Iterable[int]],
    model: PreTrainedModel,
    *,
    window: int,
    num_sink_tokens: int = 4,
    cache_dtype: str | None = None,
) -> dict[Where, tuple[str, Mapping[str, Any]]]:
    """The kinds under which these heads stream and all others see everything.

        scores = head_importance(model, batches, method="reach", window=256)
        heads = select_heads(scores, fraction=0.5, min_heads=0, model=model)
        swap_attention(model, streaming_kinds(heads, model, window=256))

    Args:
        heads: `{layer: query heads}`, whole groups that share a key/value head, as `select_heads` gives them.
        model: the model that was scored; unchanged.
        window: number of keys that a streaming head sees on each side of a query, its own included.
        num_sink_tokens: how many of the first tokens it sees as well.
        cache_dtype: of the caches of all of these layers, "int8" or "float8_e4m3fn"; `None` for the model's own.

    Returns:
        `{layer: (kind, options)}`: "streaming_heads", "sliding_window" where all heads of a layer stream, and "flash"
        for layers that are not named: all that can run these.

    Raises:
        TypeError: for anything else than a mapping of layers to lists of heads.
        ValueError: a layer or head out of range, a part of a group, or a bad window.
    """
    layers = attention_layers(model)
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads={heads!r} must be a mapping {{layer: [query head, ...]}}, as select_heads gives it")
    for where, given in heads.items():
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layer {where}: {given!r} must be a list of query heads")
    chosen = {in_range(where, len(layers), "layer"): list(own) for where, own in heads.items()}
    check_cache_dtype(cache_dtype)
    bits = {} if cache_dtype is None else {"cache_dtype": cache_dtype}
    kinds: dict[Where, tuple[str, Mapping[str, Any]]] = {}
    for layer in layers:
        own = {
            in_range(head, layer.num_heads, "head", f"layer {layer.index}: ") for head in chosen.get(layer.index, [])
        }
        group = layer.num_heads // layer.num_key_value_heads if layer.num_key_value_heads else 1
        streaming = sorted({head // group for head in own})
        whole = {streamed * group + place for streamed in streaming for place in range(group)}
        if whole != own:
            raise ValueError(
                f"layer {layer.index}: query heads {sorted(whole - own)} share a key/value head with heads that are to "
                "stream, and keys are kept for all of them or for none; choose with select_heads(..., model=model)"
            )
        options: dict[str, Any] = {"window": window, "num_sink_tokens": num_sink_tokens} | bits
        if streaming and layer.is_cross:
            raise ValueError(f"layer {layer.index} is cross-attention, whose keys are of another text: no window fits")
        if not streaming:
            if not layer.refusal:
                kinds[layer.index] = ("flash", bits)
        elif len(streaming) == layer.num_key_value_heads:
            SlidingWindowAttention(**options)
            kinds[layer.index] = (SlidingWindowAttention.name, options)
        else:
            StreamingHeadsAttention(tuple(streaming), **options)
            kinds[layer.index] = (StreamingHeadsAttention.name, {"heads": streaming} | options)
    return kinds
