"""The cache layers of windows and linear attention: every split of a text gives what one pass gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.caching import in_steps, positions, whole
from support.models import batch, build
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hf_attnkit import restore_attention, swap_attention

LENGTH, MAXIMUM, WINDOW, SINKS = 40, 64, 5, 3

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("sliding_window", {"window": WINDOW}),
    "sinks": ("sliding_window", {"window": WINDOW, "num_sink_tokens": SINKS}),
    "flash window": ("flash", {"window": WINDOW}),
    "flash": ("flash", {}),
    "streaming heads": ("streaming_heads", {"heads": [1], "window": WINDOW, "num_sink_tokens": SINKS}),
    "local_global": ("local_global", {"window": WINDOW, "num_global_tokens": 2}),
    "random blocks": (
        "local_global",
        {"window": WINDOW, "num_global_tokens": 1, "num_random_blocks": 1, "block_size": 4},
    ),
    "linear": ("linear", {}),
    "hedgehog": ("linear", {"feature_map": "hedgehog"}),
    "hybrid": ("linear", {"window": WINDOW}),
}
CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "bare": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=MAXIMUM),
}
# "padding first": the whole of the first chunk is padding in two of the rows.
SPLITS = {
    "prefill": [LENGTH],
    "tokens": [1] * LENGTH,
    "prompt and steps": [20] + [1] * 20,
    "chunks": [13, 9, 18],
    "padding first": [7, 33],
    "steps between chunks": [1, 1, 30, 8],
}
# Float64: differences are rounding, of sums over at most 40 keys through two layers.
TOLERANCE = 1e-11

every_kind = pytest.mark.parametrize("kind", KINDS)
every_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _ignore_transfer_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Swapping softmax for linear attention warns; that is tested with linear attention."""


def swapped(kind: str, family: str = "llama", layers: list[int] | None = None, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build(family, "causal", heads=4, kv_heads=2, **config).double()
    name, options = KINDS[kind]
    return swap_attention(model, name, layers=layers, **options)


# Of tests that only run it: what a run leaves is in its cache.
shared = functools.cache(swapped)


def text(model: PreTrainedModel, *lengths: int) -> tuple[Tensor, Tensor]:
    inputs = batch(model, lengths or (LENGTH, LENGTH - 7, LENGTH - 12))
    return inputs["input_ids"], inputs["attention_mask"]


def kept(cache: Cache) -> int:
    """Keys per head and row that the first layer keeps."""
    return cache.layers[0].keys.shape[2]


@pytest.mark.parametrize("split", SPLITS)
@every_cache
@every_kind
def test_split_equals_one_pass(kind: str, cache: str, split: str) -> None:
    model = shared(kind)
    ids, mask = text(model)
    real = mask.bool()
    steps = in_steps(model, ids, mask, CACHES[cache](model), SPLITS[split])
    torch.testing.assert_close(steps[real], whole(model, ids, mask)[real], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@every_cache
@every_kind
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_split_of_any_padding(kind: str, cache: str, data: st.DataObject) -> None:
    with torch.no_grad():
        model = shared(kind)
        longest = data.draw(st.integers(1, 24))
        ids, mask = text(model, longest, *data.draw(st.lists(st.integers(1, longest), max_size=2)))
        steps, left = [], longest
        while left:
            steps.append(data.draw(st.integers(1, left)))
            left -= steps[-1]
        real = mask.bool()
        result = in_steps(model, ids, mask, CACHES[cache](model), steps)
        torch.testing.assert_close(result[real], whole(model, ids, mask)[real], rtol=0, atol=TOLERANCE)


# Each kind with each pair of window, layers and cache; each three of them with a kind.
BESIDE_A_WINDOW = [
    (kind, own, layers, cache)
    for k, kind in enumerate(("window", "flash window", "flash"))
    for o, own in enumerate((3, 5, 9))
    for n, layers in enumerate((None, [0], [1]))
    for c, cache in enumerate(CACHES)
    if (k + o + n + c) % 3 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "own", "layers", "cache"), BESIDE_A_WINDOW)
def test_on_a_model_with_a_window_of_its_own(kind: str, own: int, layers: list[int] | None, cache: str) -> None:
    model = swapped(kind, "mistral", layers, sliding_window=own)
    ids, mask = text(model)
    real = mask.bool()
    expected = whole(model, ids, mask)
    made = CACHES[cache](model)
    steps = in_steps(model, ids, mask, made, SPLITS["chunks"][:2] + [1] * 18)
    torch.testing.assert_close(steps[real], expected[real], rtol=0, atol=TOLERANCE)
    if cache == "dynamic":
        smaller = own if kind == "flash" else min(own, WINDOW)
        assert [layer.keys.shape[2] for layer in made.layers] == [
            (smaller if layers in (None, [index]) else own) - 1 for index in range(2)
        ]
    # The shorter window of the two is what counts, also without a cache.
    plain = build("mistral", "causal", heads=4, kv_heads=2, sliding_window=own).double()
    plain.load_state_dict(model.state_dict())
    if kind == "flash" or own <= WINDOW:
        torch.testing.assert_close(expected[real], whole(plain, ids, mask)[real], rtol=0, atol=TOLERANCE)
    else:
        assert (expected[real] - whole(plain, ids, mask)[real]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sinks", "local_global", "linear", "hybrid"])
def test_global_tokens_and_states_beside_a_window_of_the_model_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"set config\.sliding_window to None"):
        model = swapped(kind, "mistral", sliding_window=9)
        ids, mask = text(model)
        in_steps(model, ids, mask, DynamicCache(config=model.config), [30, 10])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("window", WINDOW - 1), ("flash window", WINDOW - 1), ("sinks", WINDOW - 1 + SINKS), ("hybrid", WINDOW - 1),
     ("local_global", WINDOW - 1 + 2), ("linear", 0)],
)  # fmt: skip
@pytest.mark.parametrize("split", ["prefill", "tokens", "chunks"])
def test_dynamic_cache_keeps_only_the_window(kind: str, expected: int, split: str) -> None:
    model = swapped(kind)
    ids, mask = text(model)
    cache = DynamicCache(config=model.config)
    in_steps(model, ids, mask, cache, SPLITS[split])
    assert kept(cache) == expected
    # What is kept must not be a view of the whole prompt.
    for states in (cache.layers[0].keys, cache.layers[0].values):
        assert states.untyped_storage().nbytes() == states.nbytes
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize(("kind", "expected"), [("window", WINDOW), ("sinks", WINDOW + SINKS)])
def test_static_cache_keeps_only_the_window(kind: str, expected: int) -> None:
    model = swapped(kind)
    cache = CACHES["static"](model)
    in_steps(model, *text(model), cache, SPLITS["chunks"])
    assert kept(cache) == expected


@pytest.mark.parametrize("kind", ["linear", "hedgehog", "hybrid"])
def test_state_has_one_size(kind: str) -> None:
    model = swapped(kind)
    ids, mask = text(model)
    shapes = []
    for length in (20, LENGTH):
        cache = DynamicCache(config=model.config)
        in_steps(model, ids[:, :length], mask[:, :length], cache, [length])
        shapes.append(cache.layers[0].sums.shape)
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True},
     {"cache_implementation": "offloaded"}, {"prefill_chunk_size": 6}],
    ids=["greedy", "beams", "static", "offloaded", "chunked prefill"],
)  # fmt: skip
@every_kind
def test_generate_equals_generation_without_a_cache(kind: str, how: dict[str, Any]) -> None:
    if how.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("Transformers offloads caches from an accelerator only")
    model = swapped(kind)
    ids, mask = text(model, 18, 11, 5)
    plain = {name: value for name, value in how.items() if name == "num_beams"}
    common = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **common, **plain)
    assert torch.equal(model.generate(ids, **common, **how), expected)


@every_cache
def test_layers_of_different_kinds(cache: str) -> None:
    model = swapped("linear", layers=[0])
    name, options = KINDS["sinks"]
    swap_attention(model, name, layers=[1], **options)
    ids, mask = text(model)
    real = mask.bool()
    steps = in_steps(model, ids, mask, CACHES[cache](model), SPLITS["chunks"])
    torch.testing.assert_close(steps[real], whole(model, ids, mask)[real], rtol=0, atol=TOLERANCE)


@every_cache
@every_kind
def test_reset_cache_starts_again(kind: str, cache: str) -> None:
    model = swapped(kind)
    ids, mask = text(model)
    made = CACHES[cache](model)
    first = in_steps(model, ids, mask, made, SPLITS["chunks"])
    made.reset()
    assert int(made.get_seq_length()) == 0
    assert torch.equal(in_steps(model, ids, mask, made, SPLITS["chunks"]), first)


def continued(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, start: int) -> Tensor:
    """Logits of the tokens from `start` on, one by one."""
    logits = [
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=positions(mask)[:, at : at + 1],
              past_key_values=cache).logits
        for at in range(start, ids.shape[1])
    ]  # fmt: skip
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_kind
def test_rows_of_a_cache_follow_their_texts(kind: str, cache: str, operation: str) -> None:
    if cache == "static" and operation != "reorder_cache" and kind in ("random blocks", "flash"):
        pytest.skip("Transformers' static layer has only reorder_cache")
    model = shared(kind)
    ids, mask = text(model)
    made = CACHES[cache](model)
    in_steps(model, ids[:, :30], mask[:, :30], made, [20, 10])
    if operation == "batch_repeat_interleave":
        rows, argument = torch.arange(3).repeat_interleave(2), 2
    else:
        rows = argument = torch.tensor([2, 0, 2] if operation == "reorder_cache" else [2, 0])
    if cache == "static" and operation != "reorder_cache":
        for layer in made.layers:
            getattr(layer, operation)(argument)
    else:
        getattr(made, operation)(argument)
    ids, mask = ids[rows], mask[rows]
    expected = whole(model, ids, mask)[:, 30:]
    torch.testing.assert_close(continued(model, ids, mask, made, 30), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["window", "sinks", "linear", "hybrid"])
def test_tokens_cannot_be_taken_back(kind: str) -> None:
    model = swapped(kind)
    cache = DynamicCache(config=model.config)
    in_steps(model, *text(model), cache, [LENGTH])
    with pytest.raises(RuntimeError, match=r"cannot give back 2 tokens.*restore_attention"):
        cache.layers[0].crop(-2)


@pytest.mark.parametrize("kind", ["window", "sinks", "linear", "hybrid"])
def test_assisted_decoding_is_refused(kind: str) -> None:
    model = swapped(kind)
    assistant = build("llama", "causal", heads=4, kv_heads=2).double()
    ids, mask = text(model, 18)
    with pytest.raises((RuntimeError, ValueError), match=r"assisted|crop"):
        model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, assistant_model=assistant)


@every_cache
@pytest.mark.parametrize("kind", ["window", "sinks", "linear", "hybrid"])
def test_cache_that_another_attention_filled_is_refused(kind: str, cache: str) -> None:
    model = build("llama", "causal", heads=4, kv_heads=2).double()
    ids, mask = text(model)
    made = CACHES[cache](model)
    in_steps(model, ids[:, :9], mask[:, :9], made, [9])
    name, options = KINDS[kind]
    swap_attention(model, name, **options)
    with pytest.raises(ValueError, match=r"layer 0 runs .* already holds 9 tokens of another one; start with a new"):
        model(ids[:, 9:], attention_mask=mask, past_key_values=made)


@every_kind
def test_restored_model_has_the_cache_of_an_untouched_one(kind: str) -> None:
    model = swapped(kind)
    assert restore_attention(model) is model
    attention = model.model.layers[0].self_attn
    assert not attention._forward_pre_hooks and not attention._forward_pre_hooks_with_kwargs
    ids, mask = text(model)
    made = DynamicCache(config=model.config)
    in_steps(model, ids, mask, made, SPLITS["chunks"])
    assert kept(made) == LENGTH


def test_training_makes_no_cache() -> None:
    model = swapped("sinks").train()
    ids, mask = text(model)
    with torch.enable_grad():
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
