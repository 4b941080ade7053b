"""A cache belongs to the attention that filled it: any other use gives what that other one alone gives, or raises."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.caching import whole
from support.models import build
from support.swapping import swapped
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from hf_attnkit import restore_attention, swap_attention

LENGTH, MAXIMUM = 21, 30
KINDS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "stock": None,
    "flash": ("flash", {}),
    "flash window": ("flash", {"window": 4}),
    "window 4": ("sliding_window", {"window": 4}),
    "window 6": ("sliding_window", {"window": 6}),
    "1 sink": ("sliding_window", {"window": 4, "num_sink_tokens": 1}),
    "2 sinks": ("sliding_window", {"window": 4, "num_sink_tokens": 2}),
    "random blocks": ("local_global", {"window": 4, "num_random_blocks": 1, "block_size": 4}),
    "linear": ("linear", {}),
    "hybrid": ("linear", {"window": 4}),
}
STOCK = ("stock", "flash")  # the same function, in caches of Transformers' own
CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=MAXIMUM),
}
# Rounding in float64 over two layers; a wrong key moves the logits by about 1.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def model_of(kind: str, family: str = "llama", **options: Any) -> PreTrainedModel:
    model = build(family, "causal", heads=4, kv_heads=2, **options).double()
    found = KINDS[kind]
    return model if found is None else swapped(model, found[0], **found[1])


# Of tests that only run it: what a run leaves is in its cache.
shared = functools.cache(model_of)


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
@torch.no_grad()
def test_cache_of_another_attention(first: str, second: str, cache: str) -> None:
    one, other, ids = shared(first), shared(second), tokens()
    made = CACHES[cache](one)
    one(ids[:, :15], past_key_values=made)
    if first in STOCK and second in STOCK:
        found = other(ids[:, 15:], past_key_values=made).logits
        torch.testing.assert_close(found, other(ids, use_cache=False).logits[:, 15:], **EXACT)
        return
    with pytest.raises(ValueError, match=r"start with a new cache|holds 15 tokens"):
        other(ids[:, 15:], past_key_values=made)


@torch.no_grad()
def test_swapped_again_and_restored_in_between() -> None:
    ids = tokens()
    for change in (restore_attention, lambda model: swap_attention(model, "sliding_window", window=5)):
        model = model_of("window 4")
        made = model(ids[:, :15], use_cache=True).past_key_values
        change(model)
        with pytest.raises(ValueError, match="start with a new cache"):
            model(ids[:, 15:], past_key_values=made)


@torch.no_grad()
def test_static_cache_that_was_emptied_serves_another_attention() -> None:
    ids, mask = tokens(), torch.ones_like(tokens())
    made = CACHES["static"](model_of("window 4"))
    for kind in ("window 4", "2 sinks", "window 6", "hybrid"):
        model = model_of(kind)
        found = [model(part, past_key_values=made).logits for part in ids.split([13, 1, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(found, 1), whole(model, ids, mask), **EXACT)
        made.reset()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("backends", [("tiled", "auto"), ("auto", "tiled")], ids="then ".join)
@torch.no_grad()
def test_a_cache_may_change_the_kernel(backends: tuple[str, str], cache: str) -> None:
    """Every backend computes the same numbers, so what one has cached serves the other, and no other window does."""
    ids, model = tokens(), model_of("window 4")
    swap_attention(model, "sliding_window", window=4, backend=backends[0])
    made = CACHES[cache](model)
    first = model(ids[:, :15], past_key_values=made).logits
    swap_attention(model, "sliding_window", window=4, backend=backends[1])
    found = torch.cat([first, model(ids[:, 15:], past_key_values=made).logits], 1)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, **EXACT)
    swap_attention(model, "sliding_window", window=5, backend=backends[1])
    with pytest.raises(ValueError, match="start with a new cache"):
        model(ids[:, :1], past_key_values=made)


MATRICES = {
    "bool": lambda seen: seen,
    "float": lambda seen: torch.zeros(seen.shape).double().masked_fill(~seen, torch.finfo(torch.float64).min),
}


@pytest.mark.parametrize("form", MATRICES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["stock", "flash", "flash window", "window 4", "1 sink", "random blocks"])
@torch.no_grad()
def test_matrix_masks_piece_by_piece(kind: str, cache: str, form: str) -> None:
    """A matrix has a column for each token so far, or in a static cache for each place."""
    model, ids = model_of(kind), tokens()
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    seen = (seen | torch.eye(LENGTH, dtype=torch.bool)).tril()
    wanted = model(ids, attention_mask=MATRICES[form](seen), use_cache=False).logits
    made, found, start = CACHES[cache](model), [], 0
    for step in (9, 1, 1, 5, 1, 4):
        rows, stop = seen[:, :, start : start + step], start + step
        rows = pad(rows, (0, MAXIMUM - LENGTH)) if cache == "static" else rows[..., :stop]
        given = {"attention_mask": MATRICES[form](rows), "past_key_values": made}
        if start and kind in ("1 sink", "random blocks"):
            with pytest.raises(ValueError, match="full attention matrix"):
                model(ids[:, start:stop], **given)
            return
        found.append(model(ids[:, start:stop], **given).logits)
        start = stop
    torch.testing.assert_close(torch.cat(found, 1), wanted, **EXACT)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["flash", "window 4"])
@torch.no_grad()
def test_matrix_wider_than_the_models_own_window_keeps(kind: str, cache: str) -> None:
    """It shows keys that the cache dropped, or its columns are places that the layer does not have."""
    model, ids = model_of(kind, "mistral", sliding_window=6), tokens()
    seen = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    made = CACHES[cache](model)

    def steps() -> None:
        for start in range(LENGTH):
            rows = seen[:, :, start : start + 1]
            rows = pad(rows, (0, MAXIMUM - LENGTH)) if cache == "static" else rows[..., : start + 1]
            model(ids[:, start : start + 1], attention_mask=rows, past_key_values=made)

    if kind == "window 4" and cache == "dynamic":  # its own layer, which knows what it keeps
        return steps()
    with pytest.raises(ValueError, match="shows other keys than the last"):
        steps()


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_models_with_and_without_a_window_of_their_own(cache: str, width: int, layers: list[int]) -> None:
    options = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    model = build("qwen2", "causal", heads=4, kv_heads=2, **options).double()
    swap_attention(model, "sliding_window", window=width, layers=layers)
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[1, :3] = 0
    wanted, made, found, start = whole(model, ids, mask), CACHES[cache](model), [], 0
    for step in (9, *[1] * 8, 4):
        stop = start + step
        given = {"attention_mask": mask[:, :stop], "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]}
        found.append(model(ids[:, start:stop], past_key_values=made, **given).logits)
        start = stop
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], **EXACT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STOCK])
def test_quantized_cache_is_refused_where_nothing_would_be_quantized(kind: str) -> None:
    model, ids = model_of(kind).float(), tokens()
    with pytest.raises(ValueError, match=r"layer 0 runs .* a cache layer of its own, so a quantized cache"):
        model(ids, past_key_values=QuantizedCache("fp8", config=model.config))


def test_quantized_cache_quantizes() -> None:
    model, ids = model_of("flash").float(), tokens()
    made = QuantizedCache("fp8", config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=made)
    assert all("Quantized" in type(layer).__name__ for layer in made.layers)
