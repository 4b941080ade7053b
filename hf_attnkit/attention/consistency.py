"""Whether config, modules and `attn_implementation` of a swapped model agree."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_attnkit.attention.dispatch import stock_function
from hf_attnkit.attention.kind import ATTRIBUTE, NAME, Kind
from hf_attnkit.attention.saved_kinds import saved_in
from hf_attnkit.models.known import part_configs
from hf_attnkit.models.layers import AttentionLayer


def require_consistent(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` if the config names swapped attention that the model does not run.

    Transformers' own functions bring that about: `set_attn_implementation` after a swap, or plain
    `from_pretrained` of a swapped checkpoint.
    """
    if not is_swapped(model):
        return
    saved = [(config, saved_in(config)) for config in part_configs(model)]
    swapped = [config for config, found in saved if found is not None and found["layers"]]
    running = next((each._attn_implementation for each in swapped if each._attn_implementation != NAME), NAME)
    if running != NAME:
        raise ValueError(
            f"the config says that attention was swapped, but the model runs {running!r}; call "
            f"hf_attnkit.restore_attention(model), or model.set_attn_implementation({NAME!r}) to run the swapped one"
        )
    ours = [layer for layer in layers if runs_ours(layer)]
    if not all(hasattr(layer.module, ATTRIBUTE) for layer in ours):
        raise ValueError(
            "the config says that attention was swapped, but the layers were not told; load the checkpoint with "
            "hf_attnkit.load_pretrained"
        )


def require_unnamed_heads(layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` if the kind of one of these layers names heads by number: a change would move them."""
    for layer in layers:
        kind = getattr(layer.module, ATTRIBUTE, None)
        if isinstance(kind, Kind) and kind.names_heads:
            raise ValueError(
                f"layer {layer.index} runs {kind}, which names heads by their numbers, and these would change; call "
                "hf_attnkit.restore_attention(model), change the heads, and swap again"
            )


def require_grouping(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    heads: Sequence[tuple[int, int]],
    implementations: Sequence[str],
) -> None:
    """Raise `ValueError` if the implementation of a module that attends cannot run its numbers of heads.

    The eager attention of many classes (BERT, GPT-2) multiplies queries and keys as they are: with as many, or with one
    key/value head, which is broadcast.
    """
    for module, (num_heads, num_key_value_heads), implementation in zip(modules, heads, implementations, strict=True):
        is_grouped = num_key_value_heads not in (1, num_heads)
        if implementation == "eager" and is_grouped and not _eager_groups(module, num_heads, num_key_value_heads):
            raise ValueError(
                f"Transformers' eager attention has no grouped heads for {model.config.model_type!r}; load "
                f"{type(model).__name__} with attn_implementation='sdpa', call model.set_attn_implementation('sdpa'), "
                "or swap all of its layers (hf_attnkit.swap_attention(model, 'mha'))"
            )


def _eager_groups(module: nn.Module, num_heads: int, num_key_value_heads: int) -> bool:
    """Whether the eager attention of the module's class lets so many query heads share so many key/value heads: tried.

    The numbers matter to a module that has something for each query head (gpt-oss' sinks).
    """
    original, module = module, copy.copy(module)
    module.__dict__["num_key_value_groups"] = num_heads // num_key_value_heads
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(1))
    query, key = (like.new_zeros(1, number, 3, 8) for number in (num_heads, num_key_value_heads))
    try:
        stock_function("eager", original)(module, query, key, key, None, scaling=1.0, dropout=0.0)
    except RuntimeError:  # of shapes that do not fit
        return False
    except (AttributeError, TypeError):  # a class without one, or one that takes more: running the model will tell
        return True
    return True


def is_swapped(model: PreTrainedModel) -> bool:
    """Whether the config, or that of a part, says that some layers run one of our implementations."""
    return any(saved_in(config) is not None for config in part_configs(model))


def bases(model: PreTrainedModel) -> dict[int, str]:
    """By the id of each part's config, the implementation that the part ran before the first swap."""
    own = {id(config): saved_in(config) for config in part_configs(model)}
    first = next((saved["base"] for saved in own.values() if saved is not None), "sdpa")
    return {
        id(config): str(
            own[id(config)]["base"] if own[id(config)] is not None  # type: ignore[index]
            else first if config._attn_implementation == NAME else config._attn_implementation
        )
        for config in part_configs(model)
    }  # fmt: skip


def base_of(model: PreTrainedModel, layer: AttentionLayer | None = None) -> str:
    """The implementation that the model, or a layer of it, ran before the first swap."""
    known, config = bases(model), getattr(layer.module, "config", None) if layer is not None else None
    return known.get(id(config), known[id(model.config)])


def runs_ours(layer: AttentionLayer) -> bool:
    """Whether the layer's calls come to us."""
    config = getattr(layer.module, "config", None)
    return config is None or config._attn_implementation == NAME
