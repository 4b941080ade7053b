"""The table of attention kinds, and what stands on a module that runs one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import nn

from hf_attnkit.attention.cache import SequenceLayer
from hf_attnkit.attention.kinds import flash, gqa, linear, local_global, mha, mqa, sliding_window

NAME = "hf_attnkit"


ATTRIBUTE = "_hf_attnkit_kind"


PARAMETERS = "hf_attnkit_parameters"  # a submodule of the attention module, so that it is trained and saved with it


KEPT = "_hf_attnkit_kept_parameters"  # on the attention module: those of a kind that it ran before, with its heads


# name -> module with `attention(query, key, value, mask, *, scaling, dropout, **options)` and
# `check(num_heads, num_key_value_heads, **options)`. Optionally it has
#   NEEDS_TRANSFER        a pretrained softmax model needs training after the swap
#   SELF_ATTENTION_ONLY   queries and keys must be of one sequence
#   NO_SCORES             there is nothing to which a model's position bias could be added
#   OWN_WINDOW            applies `Mask.window`, a model's own; otherwise it comes inside a full matrix
#   RETURNS_WEIGHTS       forms attention weights, so that a model can be asked for output_attentions
#   seen                  (mask, key's shape, **options, **call arguments) -> the mask with the implementation's own
#                         pattern: which keys each query attends to; where that is less than the mask and, for a kind
#                         with the option `window`, the window say (see `dispatch.seen`)
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
