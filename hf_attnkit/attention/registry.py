"""The table of implementations, and the one place that registers anything with Transformers.

Transformers knows a single name, `hf_attnkit`, in its `AttentionInterface` and its
`AttentionMaskInterface`. Masks are made once per model and handed to all layers, so layers of
different kinds need one name; which kind a layer runs stands on its attention module (`Kind`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import flash, gqa, linear, local_global, mha, mqa, sliding_window
from .cache import CACHE_ARGUMENT, SequenceLayer
from .mask import Mask, create_mask

NAME = "hf_attnkit"
ATTRIBUTE = "_hf_attnkit_kind"
PARAMETERS = "hf_attnkit_parameters"  # a submodule of the attention module, so that it is trained and saved with it

# name -> module with `attention(query, key, value, mask, *, scaling, dropout, **options)` and
# `check(num_heads, num_key_value_heads, **options)`. Optionally it has
#   NEEDS_TRANSFER        a pretrained softmax model needs training after the swap
#   SELF_ATTENTION_ONLY   queries and keys must be of one sequence
#   NO_SCORES             there is nothing to which a model's position bias could be added
#   OWN_WINDOW            applies `Mask.window`, a model's own; otherwise it comes inside a full matrix
#   seen                  (mask, key's shape, **options, **call arguments) -> the mask with the implementation's own
#                         pattern: which keys each query attends to; where it attends to fewer than the mask says
#   CALL_ARGUMENTS        keywords that a user may give to `model(...)`
#   create_cache          (max_length, **options) -> its layer of a causal model's cache, or None for the usual
#                         one; `attention` then gets it as `cache`
#   create_parameters     (num_heads, num_key_value_heads, head_dim, **options) -> nn.Module or None; `attention`
#                         then gets it as `parameters`
IMPLEMENTATIONS: dict[str, ModuleType] = {
    "mha": mha,
    "gqa": gqa,
    "mqa": mqa,
    "sliding_window": sliding_window,
    "local_global": local_global,
    "flash": flash,
    "linear": linear,
}

# Arguments of a model's attention call that change the result and that no implementation here reads.
_UNSUPPORTED = ("softcap", "s_aux")


@dataclass(frozen=True)
class Kind:
    """What one attention module runs.

    Attributes:
        name: a key of `IMPLEMENTATIONS`, or one of Transformers' own ("sdpa", "eager") for a layer
            of a swapped model that keeps what it had.
        options: the implementation's options.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def available_attentions() -> list[str]:
    """Names that `swap_attention` accepts."""
    return list(IMPLEMENTATIONS)


def check_kind(kind: Kind, num_heads: int, num_key_value_heads: int) -> None:
    """Check a kind for a layer with these numbers of heads.

    Raises:
        ValueError: unknown name, unknown or missing option, or a value the implementation refuses.
    """
    if kind.name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {kind.name!r}; available: {', '.join(IMPLEMENTATIONS)}")
    check_options(
        f"attention {kind.name!r}", IMPLEMENTATIONS[kind.name].check, kind.options, num_heads, num_key_value_heads
    )


def check_options(what: str, check: Callable[..., None], options: Mapping[str, Any], *facts: int) -> None:
    """Call `check(*facts, **options)`, whose keywords are the options that `what` has.

    Raises:
        ValueError: for an unknown or missing option, and what `check` itself refuses.
    """
    parameters = list(inspect.signature(check).parameters.values())[len(facts) :]
    known = [parameter.name for parameter in parameters]
    unknown = [name for name in options if name not in known]
    if unknown:
        takes = ", ".join(known) if known else "no options"
        raise ValueError(f"{what} has no option {', '.join(map(str, unknown))}; it takes {takes}")
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name not in options]
    if required:
        raise ValueError(f"{what} needs the option {', '.join(required)}, for example {required[0]}=64")
    check(*facts, **options)


def create_cache(module: nn.Module, max_length: int | None) -> SequenceLayer | None:
    """The cache layer that the module's kind needs, or `None` if Transformers' own serves it.

    Args:
        max_length: that of a static cache.
    """
    kind: Kind = getattr(module, ATTRIBUTE)
    return IMPLEMENTATIONS[kind.name].create_cache(max_length, **kind.options) if has_cache(module) else None


def has_cache(module: nn.Module) -> bool:
    """Whether the module's kind may need a cache layer of its own."""
    kind: Kind | None = getattr(module, ATTRIBUTE, None)
    # A shared position bias (T5) is computed for the keys of the first layer, so all must keep all keys.
    position_bias = hasattr(module, "has_relative_attention_bias")
    return kind is not None and not position_bias and hasattr(IMPLEMENTATIONS.get(kind.name), "create_cache")


Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, Mask, float], None]
_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call `observer(module, query, key, value, mask, scaling)` at each attention call of a model
    that runs under `NAME`, before the attention itself. Shapes as in `mha.attention`; the mask shows the keys
    that the implementation attends to, and holds the model's position bias."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


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
    """The function for `AttentionInterface`: runs the kind that stands on `module`.

    Returns `(batch, queries, num_heads, head_dim)` and the weights, or `None` for kinds without.
    """
    kind: Kind | None = getattr(module, ATTRIBUTE, None)
    if kind is None:
        raise ValueError(
            f"{type(module).__name__} runs under attn_implementation={NAME!r} but no kind of attention was chosen for "
            "it. A swapped checkpoint is loaded with hf_attnkit.load_pretrained, and a model is swapped with "
            "hf_attnkit.swap_attention"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name!r}, which no attention of {NAME} applies")
    if torch.is_autocast_enabled(query.device.type):
        # As SDPA does: everything in autocast's dtype, sums in float32, nothing cast again inside.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        output, weights = _run(kind, module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)
    wanted = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if weights is None and wanted:
        # Transformers would leave this layer out of the tuple, and the others would take its place.
        raise ValueError(f"attention {kind.name!r} forms no attention weights; for output_attentions swap to 'mha'")
    return output, weights


def _run(
    kind: Kind,
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
    mask = Mask.receive(
        attention_mask, query.shape[2], key.shape[2] - (cache.num_sinks if cache is not None else 0),
        is_causal=is_causal, device=query.device, cache=cache, window=kwargs.get("sliding_window"),
    )  # fmt: skip
    stock = mask
    if (position_bias := kwargs.get("position_bias")) is not None:
        bias = position_bias[..., : mask.key_position.shape[1]]
        mask = dataclasses.replace(mask, bias=bias if mask.bias is None else mask.bias + bias)
    if kind.name not in IMPLEMENTATIONS:
        _tell_observers(module, query, key, value, mask, scaling)
        # Its function adds the position bias, which is among the keywords.
        return _run_stock(kind.name, module, query, key, value, stock, scaling, dropout, kwargs)
    implementation = IMPLEMENTATIONS[kind.name]
    given = {name: kwargs[name] for name in getattr(implementation, "CALL_ARGUMENTS", ()) if name in kwargs}
    if _observers:
        seen = (
            implementation.seen(mask, key.shape, **kind.options, **given) if hasattr(implementation, "seen") else mask
        )
        _tell_observers(module, query, key, value, seen, scaling)
    if not hasattr(implementation, "OWN_WINDOW"):
        mask = mask.as_matrix()
    if cache is not None:
        cache.prepare(mask)
    if cache is not None:
        given["cache"] = cache
    if hasattr(module, PARAMETERS):
        given["parameters"] = getattr(module, PARAMETERS)
    output, weights = implementation.attention(
        query, key, value, mask, scaling=scaling, dropout=dropout, **kind.options, **given
    )
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


def stock_function(name: str, module: nn.Module) -> Callable:
    """Transformers' own attention function; "eager" is that of the file the module's class is from."""
    if name == "eager":
        return inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]
    return AttentionInterface()[name]


def register() -> None:
    """Register `NAME` with Transformers; touches no other name."""
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name Transformers passes no mask at all.
    AttentionMaskInterface.register(NAME, create_mask)
