"""Which numbers of key/value heads a model can be converted to."""

from __future__ import annotations

from collections.abc import Sequence

from hf_attnkit.common.checks import integer
from hf_attnkit.models.layers import AttentionLayer


def target_heads(
    layers: Sequence[AttentionLayer],
    num_key_value_heads: int | Sequence[int] | None,
    budget: float | None = None,
    *,
    allow_same: bool = False,
) -> list[int]:
    """The number of key/value heads that each layer is to have.

    Args:
        allow_same: whether the present numbers are a target too.

    Raises:
        ValueError: for a number that does not divide a layer's present one, or changes nothing.
    """
    if isinstance(num_key_value_heads, (list, tuple)):
        return _listed(num_key_value_heads, layers, allow_same)
    if budget is not None:
        number = _within(budget, layers)
    elif num_key_value_heads is None:
        number = _default(layers)
    else:
        number = _checked(num_key_value_heads, layers, allow_same)
    return [number] * len(layers)


def possible_targets(layers: Sequence[AttentionLayer], *, allow_same: bool = False) -> list[int]:
    """Numbers of key/value heads that every one of these layers can be merged into."""
    most = min(layer.num_key_value_heads for layer in layers)
    found = [n for n in range(1, most + 1) if all(layer.num_key_value_heads % n == 0 for layer in layers)]
    return [n for n in found if allow_same or any(layer.num_key_value_heads != n for layer in layers)]


def check_budget(layers: Sequence[AttentionLayer], budget: float) -> None:
    """Raise `ValueError` for a share that is none, or below one head in each layer."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
        raise ValueError(
            f"budget={budget!r} must be a number between 0 and 1, the share of the key/value cache that stays"
        )
    present = sum(layer.num_key_value_heads for layer in layers)
    if budget * present + 1e-9 < len(layers):
        raise ValueError(
            f"budget={budget} of {present} key/value heads leaves less than one for each of {len(layers)} layers; the "
            f"least is {len(layers) / present:.4g}"
        )


def _within(budget: float, layers: Sequence[AttentionLayer]) -> int:
    present = sum(layer.num_key_value_heads for layer in layers)
    found = [n for n in possible_targets(layers) if n * len(layers) <= budget * present + 1e-9]
    if not found:
        raise ValueError(
            f"no uniform number of key/value heads fits budget={budget} ({_describe(layers)}); give uniform=False"
        )
    return max(found)


def _default(layers: Sequence[AttentionLayer]) -> int:
    quarter = min(layer.num_heads for layer in layers) // 4
    found = [n for n in possible_targets(layers) if n <= max(quarter, 1)]
    if not found or all(layer.num_key_value_heads * 4 <= layer.num_heads for layer in layers):
        raise ValueError(
            f"the layers already have at most a quarter as many key/value heads as query heads "
            f"({_describe(layers)}); give num_key_value_heads, one of {possible_targets(layers)}, to merge further"
        )
    return max(found)


def _checked(given: int | Sequence[int], layers: Sequence[AttentionLayer], allow_same: bool) -> int:
    number = integer(given, "num_key_value_heads", minimum=1)
    valid = possible_targets(layers, allow_same=allow_same)
    if number not in valid:
        raise ValueError(
            f"num_key_value_heads={number!r} is not possible: it must divide each layer's present number of "
            f"key/value heads and be fewer ({_describe(layers)}); possible: {valid if valid else 'none'}"
        )
    return number


def _listed(given: Sequence[int], layers: Sequence[AttentionLayer], allow_same: bool) -> list[int]:
    if len(given) != len(layers):
        raise ValueError(f"num_key_value_heads lists {len(given)} numbers, the model has {len(layers)} layers")
    numbers = [integer(number, f"num_key_value_heads[{index}]", minimum=1) for index, number in enumerate(given)]
    for layer, number in zip(layers, numbers, strict=True):
        valid = possible_targets([layer], allow_same=True)
        if number not in valid:
            raise ValueError(
                f"num_key_value_heads[{layer.index}]={number!r} is not possible: layer {layer.index} has "
                f"{layer.num_key_value_heads} key/value heads; possible: {valid}"
            )
    if not allow_same and all(layer.num_key_value_heads == n for layer, n in zip(layers, numbers, strict=True)):
        raise ValueError(f"num_key_value_heads={list(given)!r} are the present numbers, so nothing would change")
    return numbers


def _describe(layers: Sequence[AttentionLayer]) -> str:
    pairs = sorted({(layer.num_heads, layer.num_key_value_heads) for layer in layers}, reverse=True)
    return ", ".join(f"{num_heads} query over {kv} key/value" for num_heads, kv in pairs)
