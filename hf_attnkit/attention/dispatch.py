"""The one function that is registered with Transformers, and what it runs.

Transformers knows a single name, `hf_attnkit`, in its `AttentionInterface` and its
`AttentionMaskInterface`. Masks are made once per model and handed to all layers, so layers of
different kinds need one name; which kind a layer runs is written on its attention module.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_attnkit.attention.cache import CACHE_ARGUMENT, SequenceLayer
from hf_attnkit.attention.create_mask import create_mask
from hf_attnkit.attention.eight_bits import decode, is_encoded
from hf_attnkit.attention.kernels import capped
from hf_attnkit.attention.kind import ATTRIBUTE, NAME, PARAMETERS, ROTATION, Call, Kind, Stock
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.score_changes import OF_SCORES, as_stock_applies

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, Mask, float], None]


_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call `observer(module, query, key, value, mask, scaling)` before each attention call of a model under `NAME`.

    Shapes as in `Kind.attention`; the mask shows the keys that the kind attends to, and holds the model's position
    bias, the bound of its scores and its learned sinks, where these are applied.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


Editor = Callable[[nn.Module, Tensor], Tensor]


_editors: list[Editor] = []


@contextmanager
def edit(editor: Editor) -> Iterator[None]:
    """Let `editor(module, output)` replace what each attention call of a model under `NAME` gives, `(batch, queries,
    num_heads, head_dim)`, before the model does anything with it."""
    _editors.append(editor)
    try:
        yield
    finally:
        _editors.remove(editor)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function for `AttentionInterface`: runs the kind that is written on `module`.

    Returns `(batch, queries, num_heads, head_dim)` and the weights, or `None` for kinds without.
    """
    kind: Kind | Stock | None = getattr(module, ATTRIBUTE, None)
    if kind is None:
        raise ValueError(
            f"{type(module).__name__} runs under attn_implementation={NAME!r} but no kind of attention was chosen for "
            "it. A swapped checkpoint is loaded with hf_attnkit.load_pretrained, and a model is swapped with "
            "hf_attnkit.swap_attention"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call] # PyTorch says no types
        raise ValueError(
            f"torch.jit.trace keeps the path that one input takes, and attention of {NAME} takes others for other "
            "lengths and padding; use torch.compile or torch.export"
        )
    given = [name for name in OF_SCORES if kwargs.get(name) is not None]
    if given and isinstance(kind, Kind) and not kind.forms_scores:
        raise ValueError(
            f"{type(module).__name__} passes {given[0]!r}, a change of its softmax's scores, and {kind.name!r} "
            "attention forms none; use another kind for this model"
        )
    if torch.is_autocast_enabled(query.device.type):
        # As SDPA does: everything in autocast's dtype, sums in float32, nothing cast again inside.
        dtype = torch.get_autocast_dtype(query.device.type)
        floats = (torch.float32, torch.bfloat16, torch.float16)
        query, key, value = (t.to(dtype) if t.dtype in floats else t for t in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        output, weights = _run(kind, module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)
    for editor in _editors:
        output = editor(module, output)
    wanted = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if weights is None and wanted:
        # Transformers would leave this layer out of the tuple, and the others would take its place.
        raise ValueError(f"attention {kind.name!r} forms no attention weights; for output_attentions swap to 'mha'")
    return output, weights


def _run(
    kind: Kind | Stock,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    cache: SequenceLayer | None = kwargs.pop(CACHE_ARGUMENT, None)
    if is_encoded(key) and (_observers or (torch.is_grad_enabled() and query.requires_grad)):
        key, value = decode(key, query.dtype), decode(value, query.dtype)
    mask = Mask.receive(
        attention_mask, query.shape[2], key.shape[2] - (cache.num_sinks if cache is not None else 0),
        is_causal=is_causal, device=query.device, cache=cache, window=kwargs.get("sliding_window"),
    )  # fmt: skip
    if mask.document is not None and not (isinstance(kind, Kind) and kind.takes_documents):
        mask = mask.as_matrix()
    stock = mask
    if (position_bias := kwargs.get("position_bias")) is not None:
        bias = position_bias[..., : mask.key_position.shape[1]]
        mask = dataclasses.replace(mask, bias=bias if mask.bias is None else mask.bias + bias)
    softcap, sinks = (kwargs.get(name) for name in OF_SCORES)
    changed = softcap is not None or sinks is not None
    if changed:
        mask = dataclasses.replace(mask, softcap=softcap, sinks=sinks)
    if isinstance(kind, Stock):
        if _observers:
            if changed:
                mask = as_stock_applies(module, stock_function(kind.name, module), mask, query, key, value)
            _tell_observers(module, query, key, value, mask, scaling)
        # Its function adds the position bias, which is among the keywords.
        return _run_stock(kind.name, module, query, key, value, stock, scaling, dropout, kwargs)
    given = {name: kwargs[name] for name in kind.call_arguments if name in kwargs}
    call = Call(cache, getattr(module, PARAMETERS, None), given, query.shape[1], getattr(module, ROTATION, None))
    if _observers:
        shown = mask if mask.document is None else mask.as_matrix()
        _tell_observers(module, query, key, value, kind.seen(shown, key.shape, call), scaling)
    if not kind.own_window and mask.document is None:
        mask = mask.as_matrix()
    if cache is not None:
        cache.prepare(mask)
    weights: Tensor | None = None
    if changed:
        if cache is not None and cache.keeps_apart:
            raise ValueError(
                f"{type(module).__name__} caps its scores or has learned sinks, which a cache that keeps first tokens "
                "or heads apart does not take in; generate with use_cache=False, or without sink or global tokens and "
                "streaming heads"
            )
        key, value = decode(key, query.dtype), decode(value, query.dtype)
        seen = kind.seen(mask, key.shape, call)
        output, weights = capped.attention(query, key, value, seen, scaling=scaling, dropout=dropout)
    else:
        output, weights = kind.attention(query, key, value, mask, scaling=scaling, dropout=dropout, call=call)
    if cache is not None:
        cache.settle(mask)
    return output.transpose(1, 2).contiguous(), weights


def _tell_observers(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
    for observer in _observers:
        observer(module, query, key, value, mask, scaling)


def _run_stock(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scaling: float,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Run Transformers' own attention for a layer that keeps it, with the mask in the form it takes."""
    if name != "eager" and mask.is_trivial:
        return stock_function(name, module)(
            module, query, key, value, None, scaling=scaling, dropout=dropout, is_causal=mask.is_causal, **kwargs
        )
    matrix = mask.visible()
    if mask.bias is not None:
        matrix = mask.bias.masked_fill(~mask.dense, torch.finfo(mask.bias.dtype).min)  # type: ignore[operator]
    if name == "eager" and matrix is not None and matrix.dtype == torch.bool:
        matrix = torch.zeros_like(matrix, dtype=query.dtype).masked_fill(~matrix, torch.finfo(query.dtype).min)
    return stock_function(name, module)(
        module, query, key, value, matrix, scaling=scaling, dropout=dropout, is_causal=False, **kwargs
    )


def stock_function(name: str, module: nn.Module) -> AttentionFunction:
    """Transformers' own attention function; "eager" is that of the file the module's class is from."""
    own_file = inspect.getmodule(type(module))
    function: AttentionFunction = own_file.eager_attention_forward if name == "eager" else AttentionInterface()[name]  # type: ignore[union-attr]
    return function


def register() -> None:
    """Register `NAME` with Transformers; touches no other name."""
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name Transformers passes no mask at all.
    AttentionMaskInterface.register(NAME, create_mask)
