"""Continuous batching (`generate_batch`) on models whose layers have other numbers of heads than their config says.

Its paged cache takes one number of key/value heads and one head size from the config, for all layers. On another layer
writing into it fails, in a thread whose errors are logged only: `generate_batch` returns empty answers. So such a model
raises when the batching is set up.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from hf_attnkit.models.layers import attention_layers

_NAME = "init_continuous_batching"  # the way in of all of it


def refuse_paged_cache(model: PreTrainedModel, numbers: Iterable[int] | None = None) -> None:
    """Let a model whose layers do not fit a paged cache refuse it; one whose layers do, is as Transformers made it.

    Args:
        numbers: of key/value heads of its layers, where they are known; by default the model is run to find them.
    """
    if hasattr(type(model), _NAME) and reason_against(model, numbers) is not None:
        model.__dict__[_NAME] = types.MethodType(init_continuous_batching, model)
    else:
        model.__dict__.pop(_NAME, None)


def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """In the place of the model's own, which it calls if the layers fit by now.

    Raises:
        ValueError: if they do not.
    """
    if (reason := reason_against(self)) is not None:
        raise ValueError(f"continuous batching (generate_batch) cannot run {type(self).__name__}: {reason}")
    return getattr(type(self), _NAME)(self, *args, **kwargs)


def reason_against(model: PreTrainedModel, numbers: Iterable[int] | None = None) -> str | None:
    """Why a paged cache does not fit the model's layers; `None` if it does. `numbers` as of `refuse_paged_cache`."""
    config = model.config.get_text_config()
    try:
        if numbers is None:
            numbers = [layer.num_key_value_heads for layer in attention_layers(model)]
        found = sorted(set(numbers))
    except (ValueError, TypeError):  # not a model whose layers are known
        return None
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if found == [heads]:
        return None
    listed = ", ".join(map(str, found))
    return (
        f"its layers have {listed} key/value heads, and the paged cache takes {heads} for all of them from the "
        "config; use generate(), or give all layers the same number that the config can say"
    )
