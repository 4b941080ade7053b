"""Give a swapped layer the cache that it needs: a forward pre-hook on its attention module."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, EncoderDecoderCache

from hf_attnkit.attention.cache import CACHE_ARGUMENT, SequenceLayer
from hf_attnkit.attention.kind import ATTRIBUTE, NAME, Kind, has_cache
from hf_attnkit.attention.window_cache import WindowLayer

QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


def add_hook(module: nn.Module) -> None:
    """From now on the module's caches fit the kind that it runs."""
    if place_cache_layer not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(place_cache_layer, with_kwargs=True)


def remove_hook(module: nn.Module) -> None:
    """Undo `add_hook`."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if hook is place_cache_layer:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def place_cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Put the kind's layer into an empty place of the cache, and pass it on to the attention call.

    Raises:
        ValueError: if another attention, or the same with other options than `backend`, has already filled the cache,
            or the cache is to be quantized and the kind's layer is not.
    """
    config = getattr(module, "config", None)
    if not has_cache(module) or (config is not None and config._attn_implementation != NAME):
        return None  # or another implementation runs for a while
    kind: Kind = getattr(module, ATTRIBUTE)
    # By what it is: the argument is past_key_values up to Transformers 5.23, and cache from 5.24 on.
    cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if cache is None or not _is_causal(module, kwargs):
        return None
    index: int = module.layer_idx  # type: ignore[assignment]
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, SequenceLayer) or layer.owner != kind.cached_as:
        needed = kind.create_cache(_max_length(layer))
        if not isinstance(layer, SequenceLayer) and (needed is None or not _keeps_less(needed, layer)):
            return None
        held = int(layer.get_seq_length()) if layer.is_initialized else 0
        if held or needed is None:
            raise ValueError(
                f"layer {index} runs {kind}, but its cache already holds {held} tokens of another one; "
                "start with a new cache"
            )
        if isinstance(layer, QUANTIZED):
            remedy = ", and for 8 bits the option cache_dtype of swap_attention" if hasattr(kind, "cache_dtype") else ""
            raise ValueError(
                f"layer {index} runs {kind}, which has a cache layer of its own, so a quantized cache "
                f"({type(layer).__name__}) would have no effect on it; use the usual cache{remedy}"
            )
        needed.owner = kind.cached_as
        # Transformers asks the first sliding and the first other layer for the sizes of its two masks, so that a layer
        # of ours must count as the one whose mask its model hands to it.
        needed.is_sliding = layer.is_sliding
        layer = cache.layers[index] = needed
    layer.announced = True
    return args, kwargs | {CACHE_ARGUMENT: layer}


def _max_length(layer: CacheLayerMixin) -> int | None:
    return layer.max_length if isinstance(layer, SequenceLayer) else getattr(layer, "max_cache_len", None)


def _keeps_less(needed: SequenceLayer, layer: CacheLayerMixin) -> bool:
    """Whether the kind's layer should replace the cache's: not one that keeps a model's own, shorter window."""
    if not layer.is_sliding:
        return True
    dynamic = isinstance(layer, DynamicSlidingWindowLayer)  # a static one does not know the cache's length
    return (
        dynamic and type(needed) is WindowLayer and not needed.num_sink_tokens and needed.window < layer.sliding_window
    )


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether later tokens leave earlier ones as they are: what a cache that forgets keys relies on."""
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
