"""Problems for linear attention, and what they give by definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64, gradients
from support.reference import (
    exponential,
    hedgehog,
    hedgehog_weighted,
    hybrid,
    key_weights,
    phi,
    taylor,
    taylor_exponential,
)
from torch import Tensor, nn

from hf_attnkit.attention.kernels.linear_sums import LinearState
from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

SCALING = 0.3
OPTIONS: list[dict[str, Any]] = [
    {"feature_map": "elu", "window": 5, "decay": "learned"},
    {"feature_map": "hedgehog", "decay": "learned"},
    {"feature_map": "hedgehog_weighted", "window": 1},
    {"feature_map": "hedgehog", "window": 7, "gate": "learned"},
    {"feature_map": "hedgehog", "window": 1000},
    {"feature_map": "exponential", "window": 5},
    {"feature_map": "taylor"},
    {"feature_map": "taylor_exponential", "window": 7, "gate": "learned", "decay": "learned"},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
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
    """The library's output; `learned` as from `learned_for`, `cache` anything with `sums`."""
    kind = LinearAttention(**options)
    call = Call(cache, parameters(options, query, key, *learned))
    return kind.attention(query, key, value, mask, scaling=SCALING, dropout=dropout, call=call)[0]


def parameters(options: dict[str, Any], query: Tensor, key: Tensor, *learned: Tensor) -> nn.Module | None:
    """What the kind learns, with these values: plain tensors, so that their gradients are asked for."""
    made = LinearAttention(**options).create_parameters(query.shape[1], key.shape[1], query.shape[3])
    for name, tensor in zip(names(options), learned, strict=True):
        path, _, last = name.rpartition(".")
        module = made.get_submodule(path)
        del module._parameters[last]
        setattr(module, last, tensor)
    return made


def names(options: dict[str, Any]) -> list[str]:
    """Of what the kind learns, in the order of its `parameters()`."""
    made = LinearAttention(**options).create_parameters(1, 1, 1)
    return [] if made is None else [name for name, _ in made.named_parameters()]


def expected(
    options: dict[str, Any],
    mask: Mask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *learned: Tensor,
    scaling: float = SCALING,
    **more: Any,
) -> Tensor:
    distance = mask.query_position[:, None, :, None] - mask.key_position[:, None, None, :]
    visible = distance >= 0 if mask.is_causal else distance == distance
    if mask.key_visible is not None:
        visible = visible & mask.key_visible[:, None, None, :]
    if mask.document is not None:
        visible = visible & (mask.document[:, None, :, None] == mask.document[:, None, None, :])
    of = dict(zip(names(options), learned, strict=True))
    phis = {f"phi_{side}": features(options["feature_map"], of, side) for side in ("query", "key")}
    near = distance.abs() < options.get("window", 0)
    left = {"both": visible, "window": visible & near, "linear": visible & ~near}[options.get("branches", "both")]
    if "decay.weight" in of:
        a = left_of(of, key, mask.key_visible)
        more |= {"factor": decayed(a, distance[0, 0], options.get("window", 0))}
    return hybrid(query, key, value, left, near, scaling=scaling, gate=of.get("gate.weight"), **phis, **more)


def features(name: str, of: dict[str, Tensor], side: str) -> Callable[[Tensor], Tensor]:
    """The map of queries or of keys, from the definition."""
    own = {part.removeprefix(f"{side}."): tensor for part, tensor in of.items() if part.startswith(f"{side}.")}
    if name == "elu":
        return phi
    if name == "hedgehog":
        return lambda x: hedgehog(x, own["weight"], own["bias"])
    if name == "hedgehog_weighted":
        return lambda x: hedgehog_weighted(x, own["weight"], own["bias"], own.get("weigh"), own.get("scale"))
    if name == "exponential":
        return lambda x: exponential(x, own["weight"], own["bias"]) * key_weights(x, own.get("weigh"))
    if name == "taylor":
        return lambda x: taylor(x, own["project.weight"], own["project.bias"], own.get("weigh"))
    series = (own["taylor.project.weight"], own["taylor.project.bias"], own.get("taylor.weigh"))
    return lambda x: taylor_exponential(x, *series, own["exponents.weight"], own["exponents.bias"])


def left_of(of: dict[str, Tensor], key: Tensor, seen: Tensor | None) -> Tensor:
    """What each token leaves of the state before it, `(B, G, K)`; padding leaves all."""
    a = torch.sigmoid(torch.einsum("bgkd,gd->bgk", key, of["decay.weight"]) + of["decay.bias"][:, None])
    return a if seen is None else torch.where(seen[:, None], a, 1.0)


def decayed(a: Tensor, distance: Tensor, window: int) -> Tensor:
    """What the state leaves of each key for each query, `(B, G, Q, K)`, from what each token leaves of it.

    Args:
        a: `(B, G, K)`.
        distance: query position minus key position, `(Q, K)`.
        window: 0 for none. A query reads the states at the tokens that many before and after its own.
    """
    length = a.shape[-1]
    rows, ahead = [a[..., :0]], [a[..., :0]]
    for t in range(length):  # from each earlier key up to token t, and from token t up to each later key
        rows.append(torch.cat([rows[-1] * a[..., t : t + 1], torch.ones_like(a[..., :1])], dim=-1))
        back = a[..., length - 1 - t : length - t]
        ahead.append(torch.cat([torch.ones_like(back), back * ahead[-1]], dim=-1))
    found = []
    for of_keys in distance:
        own = int(of_keys[0])  # the query's place among the keys
        before, after = min(own - window, length - 1) + 1, max(length - own - window, 0)
        past = rows[max(before, 0)]
        future = ahead[min(after, length)]
        line = torch.cat([past, a.new_ones(*a.shape[:2], length - past.shape[-1])], dim=-1)
        later = torch.cat([a.new_ones(*a.shape[:2], length - future.shape[-1]), future], dim=-1)
        found.append(torch.where(of_keys >= window, line, torch.where(of_keys <= -window, later, 1.0)))
    return torch.stack(found, dim=2)


def learned_for(options: dict[str, Any], heads: int, kv_heads: int, dim: int = 6) -> list[Tensor]:
    """Trained-looking values of what the kind learns, in the order of its `parameters()`."""
    of_maps = ("query.weight", "query.bias", "key.weight", "key.bias")
    values = dict(zip(of_maps, maps(heads, kv_heads, dim), strict=True))
    if options["feature_map"] == "exponential":  # whose products must fit float16
        values = {name: 0.5 * values[name] for name in of_maps}
    values["gate.weight"] = torch.linspace(-1.0, 1.2, heads, dtype=torch.float64)
    for part in ("project", "taylor.project", "exponents"):
        values |= {name.replace(".", f".{part}."): 0.5 * values[name] for name in of_maps}
    generator = torch.Generator().manual_seed(9)
    weigh = 0.3 * torch.randn((kv_heads, dim), generator=generator, dtype=torch.float64)
    values |= {"key.weigh": weigh, "key.taylor.weigh": weigh, "key.scale": 1.0 + weigh[:, 0]}
    generator = torch.Generator().manual_seed(8)
    values["decay.weight"] = 0.4 * torch.randn((kv_heads, dim), generator=generator, dtype=torch.float64)
    values["decay.bias"] = torch.linspace(3.0, 0.5, kv_heads, dtype=torch.float64)
    return [values[name] for name in names(options)]


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
