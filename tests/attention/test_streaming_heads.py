"""Heads that see everything next to heads that stream: what is not in the shared matrix of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.caching import in_steps
from support.models import batch, build
from support.unchanged import unchanged
from transformers import DynamicCache, StaticCache

from hf_attnkit import convert_to_gqa, load_pretrained, prune_heads, select_heads, streaming_kinds, swap_attention
from hf_attnkit.attention.growing_cache import BLOCK, GrowingLayer
from hf_attnkit.attention.heads_cache import HeadsLayer
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.models.layers import attention_layers

WINDOW, SINKS = 5, 2
STREAM = {"heads": [1, 2], "window": WINDOW, "num_sink_tokens": SINKS}


def model_of(**options: Any) -> Any:
    return build("llama", "causal", 8, 4, **options)


def test_from_chosen_heads_to_kinds() -> None:
    model = model_of(num_hidden_layers=3)
    chosen = {0: [2, 3], 2: [0, 1, 2, 3, 4, 5, 6, 7]}
    kinds = streaming_kinds(chosen, model, window=WINDOW, num_sink_tokens=SINKS)
    options = {"window": WINDOW, "num_sink_tokens": SINKS}
    assert kinds == {
        0: ("streaming_heads", {"heads": [1]} | options),
        1: ("flash", {}),
        2: ("sliding_window", options),
    }
    small = streaming_kinds(chosen, model, window=WINDOW, num_sink_tokens=SINKS, cache_dtype="int8")
    assert small == {layer: (name, given | {"cache_dtype": "int8"}) for layer, (name, given) in kinds.items()}
    swap_attention(model, small)
    swap_attention(model, kinds)
    assert [getattr(layer.self_attn, ATTRIBUTE).name for layer in model.model.layers] == [
        kinds[index][0] for index in range(3)
    ]


def test_the_lowest_scores_stream() -> None:
    scores = torch.tensor([[9.0, 9, 1, 1, 9, 9, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
    model = model_of()
    kinds = streaming_kinds(select_heads(scores, num_heads=12, min_heads=0, model=model), model, window=4)
    assert kinds[0] == ("streaming_heads", {"heads": [1, 3], "window": 4, "num_sink_tokens": 4})
    assert kinds[1] == ("sliding_window", {"window": 4, "num_sink_tokens": 4})


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ({2: [0]}, {"window": 4}, "layer 2"),
        ({0: [8]}, {"window": 4}, "layer 0: .*head 8"),
        ({0: [0]}, {"window": 4}, r"layer 0: query heads \[1\] share a key/value head"),
        ({0: [0, 1]}, {"window": 0}, "window=0 must be"),
        ({0: [0, 1]}, {"window": 4, "num_sink_tokens": -1}, "num_sink_tokens=-1 must"),
        ({0: [0, 1]}, {"window": 4, "cache_dtype": "int4"}, "cache_dtype='int4' must be one of 'int8'"),
    ],
)
def test_heads_that_cannot_stream(heads: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streaming_kinds(heads, model_of(), **options)


@pytest.mark.parametrize(("heads", "message"), [([0], "must be a mapping"), ({0: 5}, "layer 0: 5 must be a list")])
def test_heads_in_another_form(heads: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        streaming_kinds(heads, model_of(), window=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": []}, "names no head that streams.*'flash'"),
        ({"heads": [4]}, r"names head 4, and the layer has 4 key/value heads: 0 to 3"),
        ({"heads": [1, 1]}, "names head 1 twice"),
        ({"heads": [-1]}, "heads=-1 must be"),
        ({"heads": [True]}, "heads=True must be"),
        ({"heads": "1"}, "must be a list of key/value heads"),
        ({"heads": 1}, "must be a list of key/value heads"),
        ({"heads": [0, 1, 2, 3]}, "all heads of the layer.*'sliding_window' with window=4 and num_sink_tokens=4"),
        ({"heads": [0], "window": 0}, "window=0 must be"),
        ({"heads": [0], "num_sink_tokens": True}, "num_sink_tokens=True must be"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    model = model_of()
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "streaming_heads", **({"window": 4} | options))


def test_the_cache_keeps_all_tokens_of_some_heads_only() -> None:
    model = swap_attention(model_of().double(), "streaming_heads", **STREAM)
    inputs = batch(model, (40, 33))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        in_steps(model, inputs["input_ids"], inputs["attention_mask"], cache, [20] + [1] * 20)
    for layer in cache.layers:
        assert isinstance(layer, HeadsLayer)
        assert layer.far.keys.shape[1:3] == (2, 40)
        assert layer.near.keys.shape[1:3] == (2, SINKS + WINDOW - 1)
        assert layer.near.keys.untyped_storage().nbytes() == layer.near.keys.nbytes
        # At most a block of memory that is not used yet.
        assert layer.far.keys.untyped_storage().nbytes() <= layer.far.keys.nbytes / 40 * (40 + BLOCK)
    static = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad():
        in_steps(model, inputs["input_ids"], inputs["attention_mask"], static, [20] + [1] * 20)
    assert [layer.near.keys.shape[2] for layer in static.layers] == [SINKS + WINDOW] * 2


def test_memory_that_grows_by_blocks() -> None:
    """A step writes into memory that is there; rows that are chosen get their own; gradients need what was there."""
    layer = GrowingLayer()

    def add(number: int) -> None:
        layer.announced = True
        start = layer.keys.shape[2] if layer.is_initialized else 0
        new = torch.arange(start, start + number).double().expand(2, 3, number).unsqueeze(-1)
        layer.update(new, -new)

    with torch.no_grad():
        add(BLOCK - 2)
        place = layer.keys.data_ptr()
        add(1)
        assert layer.keys.data_ptr() == place
        add(1)
        add(BLOCK)
        layer.reorder_cache(torch.tensor([1, 0]))
        add(3)
    with torch.inference_mode():
        add(2)
    with torch.no_grad():
        add(2)
    before = layer.keys
    copy = before.clone()
    add(2)
    add(2)
    assert torch.equal(before, copy)
    expected = torch.arange(2 * BLOCK + 11).double()
    assert torch.equal(layer.keys, expected.expand(2, 3, -1).unsqueeze(-1))
    assert torch.equal(layer.values, -layer.keys) and layer.get_seq_length() == len(expected)


@pytest.mark.parametrize(
    "change", [lambda model: prune_heads(model, {1: [0, 1]}), lambda model: convert_to_gqa(model, 2)]
)
def test_heads_that_are_named_do_not_move(change: Callable[[Any], Any]) -> None:
    model = swap_attention(model_of(), {1: ("streaming_heads", STREAM)})
    with unchanged(model), pytest.raises(ValueError, match=r"layer 1 runs 'streaming_heads'.*names heads by their"):
        change(model)
    prune_heads(model, {0: [0, 1]})
    assert attention_layers(model)[0].num_key_value_heads == 3


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = swap_attention(model_of(), {1: ("streaming_heads", STREAM)})
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    kinds = [getattr(each.model.layers[1].self_attn, ATTRIBUTE) for each in (model, again)]
    assert kinds[0] == kinds[1] and kinds[0].heads == (1, 2)
    assert torch.equal(again(**batch(model)).logits, model(**batch(model)).logits)
