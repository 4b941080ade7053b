"""Run batches through a model and look at every attention call, whatever attention it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.attention.choose_kinds import STOCK
from hf_attnkit.attention.consistency import require_consistent
from hf_attnkit.attention.kind import ATTRIBUTE, NAME, Kind, Stock
from hf_attnkit.attention.mask import Mask
from hf_attnkit.models.discovery import is_spread, quiet, run_outputs
from hf_attnkit.models.known import known, part_configs
from hf_attnkit.models.layers import AttentionLayer, attention_layers


def require_visible(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
    """Raise `ValueError` for a layer whose attention calls cannot be looked at."""
    refusals = [layer for layer in layers if layer.refusal]
    if refusals:
        raise ValueError(
            f"{refusals[0].name} of {type(model).__name__} cannot be looked at: {refusals[0].refusal}; take a method "
            "that needs the heads' outputs only, such as 'contribution'"
        )


@contextmanager
def visible_attention(
    model: PreTrainedModel, *, adapters: bool = False, only: Sequence[AttentionLayer] | None = None
) -> Iterator[None]:
    """Within the context, every attention call of the model goes through `hf_attnkit`; each layer runs what it ran.

    Fused kernels whose masks are not tensors (flash-attention, FlexAttention) are replaced by SDPA, or by the model's
    eager attention where SDPA does not apply what the layer passes.

    Args:
        adapters: accept a model with PEFT adapters inside.
        only: the layers that are looked at, the others may be opaque; by default all.
    """
    layers = attention_layers(model, adapters=adapters)
    require_consistent(model, layers)
    require_visible(model, layers if only is None else only)
    layers = [layer for layer in layers if not layer.is_opaque]
    stock = [layer for layer in layers if not hasattr(layer.module, ATTRIBUTE)]
    with shown(model, stock):
        if stock:
            _require_running(model)
        yield


def require_shown(model: PreTrainedModel) -> list[AttentionLayer]:
    """What `shown` takes, of a model that `visible_attention` does not refuse.

    Raises:
        TypeError, ValueError: as `visible_attention`.
    """
    with visible_attention(model):
        pass
    return [layer for layer in attention_layers(model) if not hasattr(layer.module, ATTRIBUTE)]


@contextmanager
def shown(model: PreTrainedModel, stock: Sequence[AttentionLayer]) -> Iterator[None]:
    """As `visible_attention`, of a model that is known to run so: it is not looked at again, which takes a run.

    Args:
        stock: all layers that run Transformers' own attention, of this model in whatever state.
    """
    if not stock:
        yield
        return
    own = [layer.module.config for layer in stock if hasattr(layer.module, "config")]
    configs = {id(config): config for config in (*part_configs(model), *own)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    name = next((found for _, found in before if found in STOCK), "sdpa")
    try:
        for layer in stock:
            running = getattr(getattr(layer.module, "config", None), "_attn_implementation", name)
            setattr(layer.module, ATTRIBUTE, Stock(running if running in STOCK else _tensor_masked(layer)))
        model.set_attn_implementation(NAME)
        for layer in stock:
            if (config := getattr(layer.module, "config", None)) is not None:
                # Transformers sets it only for classes whose source has a word that it looks for.
                config._attn_implementation_internal = NAME
        yield
    finally:
        for config, running in before:
            config._attn_implementation_internal = running
        for layer in stock:
            delattr(layer.module, ATTRIBUTE)


def _require_running(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that does something of its own with the masks that Transformers makes for it."""
    found = known(model)
    if found.is_visible or any(map(is_spread, model.parameters())):  # a sharded model does not run alone
        return
    try:
        with quiet(model):
            run_outputs(model, found.discovery.inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's code raises
        raise ValueError(
            f"{type(model).__name__} does not run while its attention is looked at ({type(error).__name__}: "
            f"{str(error)[:200]}); take a method that needs the heads' outputs only, such as 'contribution'"
        ) from error
    found.is_visible = True


def _tensor_masked(layer: AttentionLayer) -> str:
    found = layer.attention
    return "eager" if found is not None and (found.softcap is not None or found.has_sinks) else "sdpa"


def has_softmax(module: nn.Module) -> bool:
    """Whether the module attends by a softmax of scores; linear attention has no attention weights."""
    kind = getattr(module, ATTRIBUTE, None)
    return not isinstance(kind, Kind) or kind.forms_scores


def real_queries(layer: AttentionLayer, mask: Mask, inputs: Mapping[str, Any]) -> Tensor | None:
    """Which queries are tokens and not padding: bool `(B or 1, Q)`, or `None` if all are.

    Queries and keys of one sequence are the same tokens, so a query is padding where its own key is hidden. Those of
    a decoder's cross-attention are told by the batch's mask of the decoder's own tokens.
    """
    if layer.is_cross:
        own = inputs.get(layer.padding) if layer.padding else None
        return None if own is None else own.bool()
    if mask.dense is not None:
        whole = mask.dense.expand(-1, -1, mask.key_position.shape[1], -1)
        return whole.diagonal(dim1=-2, dim2=-1)[:, 0]
    return mask.key_visible
