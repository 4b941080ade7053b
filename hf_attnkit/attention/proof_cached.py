"""Proof of a cache in 8 bits, on the model itself. It keeps rounded numbers, so the cached model is not the stock one.

The swapped model runs on a few tokens without a cache and again with one; the second run continues with the first
run's output of each call, so that both have the same queries, keys and values there. Of each call in 8 bits is proved:

    what is kept       each number is within half a step of the one that was given, see `eight_bits`
    what is computed   the output is the kind's own over the kept numbers, within the rounding of `proof.py`

The kind without a cache is proved by `proof.py`. How far the outputs of the whole model move is measured, not proved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention.cache import CACHE_ARGUMENT
from hf_attnkit.attention.eight_bits import decode, is_encoded, most_off
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.attention.proof import rounding_bound
from hf_attnkit.models.discovery import quiet
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.models.tensors import cloned


def prove_cached(model: PreTrainedModel, swapped: Sequence[AttentionLayer], inputs: Mapping[str, Any]) -> None:
    """Prove the caches of those layers that keep 8 bits; of others nothing is left to prove.

    Args:
        inputs: under which the model runs, without a cache.

    Raises:
        ValueError: if a layer keeps or computes something else, or the model runs without a cache.
    """
    names = {id(layer.module): layer.name for layer in swapped if _dtype(layer.module) is not None}
    if not names:
        return
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    problems: list[str] = []

    def note(call: Call) -> tuple[Tensor, Any]:
        output, weights = call.run()
        seen.setdefault(id(call.module), []).append((call.key, call.value, output))
        return output, weights

    def compare(call: Call) -> tuple[Tensor, Any]:
        key, value, output = seen[id(call.module)].pop(0)
        if problem := _problem(call, key, value):
            problems.append(f"{names[id(call.module)]} {problem}")
        return output, None

    modules = [layer.module for layer in swapped if id(layer.module) in names]
    with quiet(model):
        with watched(modules, note):
            model(**cloned(dict(inputs)))
        with watched(modules, compare):
            model(**cloned(dict(inputs)) | {"use_cache": True})
    if problems:
        raise ValueError(
            f"the cache of the swapped {type(model).__name__} is not what it should be: {problems[0]}; the model is "
            "unchanged"
        )


def _dtype(module: Any) -> str | None:
    return getattr(getattr(module, ATTRIBUTE), "cache_dtype", None)


def _problem(call: Call, key: Tensor, value: Tensor) -> str:
    """What is wrong with a call that reads 8 bits, or nothing; `key` and `value` are what the layer was given."""
    cache_dtype = _dtype(call.module)
    assert cache_dtype is not None
    if not is_encoded(call.key):
        return f"attends to no keys in {cache_dtype!r}: the model runs without a cache, so cache_dtype would do nothing"
    for what, given, states in (("keys", key, call.key), ("values", value, call.value)):
        kept = decode(states, given.dtype)
        if kept.shape != given.shape or not bool((kept - given).abs().le(most_off(given, cache_dtype)).all()):
            return f"keeps {what} in {cache_dtype!r} that are further from those it was given than half a step"
    output = call.run()[0]
    keywords = {name: each for name, each in call.keywords.items() if name != CACHE_ARGUMENT}
    plain = replace(
        call, key=decode(call.key, key.dtype), value=decode(call.value, value.dtype), keywords=keywords
    )  # fmt: skip
    off, bound = float((output.double() - plain.run()[0].double()).abs().max()), rounding_bound(plain)
    if not off <= bound:
        return f"differs by {off:.1e} from attention to the keys that it keeps, more than the {bound:.1e} of rounding"
    return ""
