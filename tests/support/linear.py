"""Problems for linear attention, and what they give by definition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64, gradients
from support.reference import hedgehog, hybrid, phi
from torch import Tensor

from hf_attnkit.attention.kernels.linear_sums import LinearState
from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

SCALING = 0.3
OPTIONS: list[dict[str, Any]] = [
    {"feature_map": "elu", "window": 5},
    {"feature_map": "hedgehog"},
    {"feature_map": "hedgehog", "window": 1},
    {"feature_map": "hedgehog", "window": 7},
    {"feature_map": "hedgehog", "window": 1000},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['feature_map']}-{o.get('window')}")
both_ways = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def inputs(heads: int, kv_heads: int, queries: int, keys: int, dim: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim))
    return [1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def maps(heads: int, kv_heads: int, dim: int = 6) -> list[Tensor]:
    """Weights and biases of a trained-looking Hedgehog module, in the order of its `parameters()`."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((heads, dim, dim), (heads, dim), (kv_heads, dim, dim), (kv_heads, dim))
    return [0.6 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def padding(kind: str, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[1, slice(0, keys // 3) if kind == "left" else slice(keys - keys // 3, None)] = False
    return seen


def run(
    options: dict[str, Any],
    mask: Mask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *learned: Tensor,
    dropout: float = 0.0,
    cache: Any = None,
) -> Tensor:
    """The library's output; `learned` as from `maps`, `cache` anything with `sums`."""
    kind = LinearAttention(**options)
    parameters = kind.create_parameters(query.shape[1], key.shape[1], query.shape[3])
    if parameters is not None:
        for name, tensor in zip(("query.weight", "query.bias", "key.weight", "key.bias"), learned, strict=True):
            module = parameters.get_submodule(name.split(".")[0])
            del module._parameters[name.split(".")[1]]
            setattr(module, name.split(".")[1], tensor)  # a plain tensor, so that its gradient is asked for
    call = Call(cache, parameters)
    return kind.attention(query, key, value, mask, scaling=SCALING, dropout=dropout, call=call)[0]


def expected(
    options: dict[str, Any], mask: Mask, query: Tensor, key: Tensor, value: Tensor, *learned: Tensor, **more: Any
) -> Tensor:
    distance = mask.query_position[:, None, :, None] - mask.key_position[:, None, None, :]
    visible = distance >= 0 if mask.is_causal else distance == distance
    if mask.key_visible is not None:
        visible = visible & mask.key_visible[:, None, None, :]
    phis = {"phi_query": phi, "phi_key": phi}
    if learned:
        phis["phi_query"] = lambda x: hedgehog(x, *learned[:2])
        phis["phi_key"] = lambda x: hedgehog(x, *learned[2:])
    near = distance.abs() < options.get("window", 0)
    return hybrid(query, key, value, visible, near, scaling=SCALING, **phis, **more)


def learned_for(options: dict[str, Any], heads: int, kv_heads: int, dim: int = 6) -> list[Tensor]:
    return maps(heads, kv_heads, dim) if options["feature_map"] == "hedgehog" else []


def compare(options: dict[str, Any], mask: Mask, tensors: Sequence[Tensor]) -> None:
    """Outputs, and gradients with respect to queries, keys, values and the maps."""
    got = gradients(partial(run, options, mask), *tensors)
    want = gradients(partial(expected, options, mask), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=2 * tensors[1].shape[2])


def generate(options: dict[str, Any], sizes: Sequence[int], seen: Tensor | None, tensors: list[Tensor]) -> tuple:
    """Outputs of one call after the other, of `sizes` tokens each, and the state left behind."""
    query, key, value, *learned = tensors
    state, outputs, start = LinearState(), [], 0
    for size in sizes:
        stop = start + size
        given = slice(max(0, start - max(options.get("window", 1) - 1, 0)), stop)
        visible = None if seen is None else seen[:, given]
        # As a model does: one new token has no future to hide.
        mask = Mask.aligned(size, stop - given.start, is_causal=size > 1, key_visible=visible)
        parts = query[:, :, start:stop], key[:, :, given], value[:, :, given]
        outputs.append(run(options, mask, *parts, *learned, cache=state))
        start = stop
    assert start == query.shape[2]
    return torch.cat(outputs, dim=2), state
