"""`convert_to_gqa`: merge consecutive key/value heads of a pretrained model into fewer.

    before     q0 q1 q2 q3 q4 q5        after, 2 key/value heads     q0 q1 q2 q3 q4 q5
    (6 over 6) k0 k1 k2 k3 k4 k5                                     \\- k0 -/ \\- k1 -/

Query head h then uses key/value head h // (num_attention_heads // num_key_value_heads), as in
Transformers' `repeat_kv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..change import change_heads
from ..families import AttentionLayer, editable_layers
from ..surgery import pool_rows
from . import mean

# method -> pooling of key and value heads, (groups, heads per group, ...) to (groups, ...)
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean.pool,
}


def convert_to_gqa(
    model: PreTrainedModel,
    num_key_value_heads: int | None = None,
    *,
    method: str = "mean",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    refit: bool | None = None,
) -> PreTrainedModel:
    """Convert all layers to grouped-query attention with `num_key_value_heads` key/value heads.

    Queries and the output projection are untouched. A Llama or Mistral saved afterwards is a plain
    GQA checkpoint; BERT's config has no such field, so a converted BERT reloads with
    `load_pretrained`.

    Args:
        model: a model of a supported family; changed in place. Grouped models can be grouped further.
        num_key_value_heads: must divide each layer's present number of key/value heads. Default:
            the largest such number that is at most a quarter of the query heads.
        method: "mean", mean-pooling (Ainslie et al. 2023).
        calibration, refit: for methods that use data; "mean" uses none and refuses them.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a plain `PreTrainedModel`.
        ValueError: for a number that does not divide or would change nothing, an unknown method, an
            unsupported, quantized, PEFT-wrapped or weightless model. The model is then unchanged.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; available: {', '.join(METHODS)}")
    if calibration is not None or refit:
        given = "calibration" if calibration is not None else "refit"
        raise ValueError(f"method {method!r} uses no data, so {given} would have no effect; leave it out")
    layers = editable_layers(model)
    number = target_heads(layers, num_key_value_heads)

    edits = []
    for layer in layers:
        for projection in (layer.key, layer.value):
            edits.append(pool_rows(projection, number, layer.head_dim, METHODS[method]))
    change_heads(model, edits, [(layer.num_heads, number) for layer in layers])
    return model


def convert_to_mqa(
    model: PreTrainedModel,
    *,
    method: str = "mean",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    refit: bool | None = None,
) -> PreTrainedModel:
    """Convert to multi-query attention: `convert_to_gqa` with one key/value head."""
    return convert_to_gqa(model, 1, method=method, calibration=calibration, refit=refit)


def target_heads(layers: Sequence[AttentionLayer], num_key_value_heads: int | None) -> int:
    """The number of key/value heads that `convert_to_gqa` would give these layers; raises as it does."""
    return _default(layers) if num_key_value_heads is None else _checked(num_key_value_heads, layers)


def _valid(layers: Sequence[AttentionLayer]) -> list[int]:
    """Numbers of key/value heads that every layer can be merged into, the present one excepted."""
    most = min(layer.num_key_value_heads for layer in layers)
    numbers = [n for n in range(1, most + 1) if all(layer.num_key_value_heads % n == 0 for layer in layers)]
    return [n for n in numbers if any(layer.num_key_value_heads != n for layer in layers)]


def _default(layers: Sequence[AttentionLayer]) -> int:
    quarter = min(layer.num_heads for layer in layers) // 4
    numbers = [n for n in _valid(layers) if n <= max(quarter, 1)]
    if not numbers or all(layer.num_key_value_heads * 4 <= layer.num_heads for layer in layers):
        raise ValueError(
            f"the layers already have at most a quarter as many key/value heads as query heads "
            f"({_describe(layers)}); give num_key_value_heads, one of {_valid(layers)}, to merge further"
        )
    return max(numbers)


def _checked(number: int, layers: Sequence[AttentionLayer]) -> int:
    valid = _valid(layers)
    if not isinstance(number, int) or isinstance(number, bool) or number not in valid:
        raise ValueError(
            f"num_key_value_heads={number!r} is not possible: it must divide each layer's present number of "
            f"key/value heads and be fewer ({_describe(layers)}); possible: {valid if valid else 'none'}"
        )
    return number


def _describe(layers: Sequence[AttentionLayer]) -> str:
    pairs = sorted({(layer.num_heads, layer.num_key_value_heads) for layer in layers}, reverse=True)
    return ", ".join(f"{num_heads} query over {kv} key/value" for num_heads, kv in pairs)
