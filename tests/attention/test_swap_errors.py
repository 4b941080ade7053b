"""Bad input to `swap_attention`: the exception names the value and the remedy, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.models import build
from support.unchanged import unchanged

from hf_attnkit import restore_attention, swap_attention

NAMES = "mha, gqa, mqa, sliding_window, streaming_heads, local_global, flash, linear"
Bad = tuple[Callable[[Any], Any], type[Exception], str]

# 8 query over 4 key/value heads, layers 0 and 1.
MODEL: dict[str, Bad] = {
    "swap: unknown": (lambda m: swap_attention(m, "fast"), ValueError, f"'fast'; available: {NAMES}"),
    "swap: empty name": (lambda m: swap_attention(m, ""), ValueError, f"''; available: {NAMES}"),
    "swap: no name": (lambda m: swap_attention(m, None), (TypeError, ValueError), "None"),
    "swap: number": (lambda m: swap_attention(m, 5), (TypeError, ValueError), "5"),
    "swap: short tuple": (lambda m: swap_attention(m, {0: ("flash",)}), (TypeError, ValueError), "flash"),
    "swap: options no mapping": (lambda m: swap_attention(m, {0: ("flash", 3)}), (TypeError, ValueError), "3"),
    "swap: unknown option": (
        lambda m: swap_attention(m, "sliding_window", window=4, size=3),
        ValueError,
        "no option size; it takes window",
    ),
    "swap: option of none": (
        lambda m: swap_attention(m, "mha", window=4),
        ValueError,
        "no option window; it takes no options",
    ),
    "swap: missing option": (
        lambda m: swap_attention(m, "sliding_window"),
        ValueError,
        "needs the option window, for example window=64",
    ),
    "swap: window 0": (lambda m: swap_attention(m, "sliding_window", window=0), ValueError, "window=0 .*at least 1"),
    "swap: window float": (
        lambda m: swap_attention(m, "sliding_window", window=4.0),
        ValueError,
        r"window=4\.0 must be an integer",
    ),
    "swap: window bool": (
        lambda m: swap_attention(m, "sliding_window", window=True),
        ValueError,
        "window=True must be an integer",
    ),
    "swap: global tokens": (
        lambda m: swap_attention(m, "local_global", window=4, num_global_tokens=-1),
        ValueError,
        "num_global_tokens=-1 .*at least 0",
    ),
    "swap: random blocks": (
        lambda m: swap_attention(m, "local_global", window=4, num_random_blocks="2"),
        ValueError,
        "num_random_blocks='2' must be an integer",
    ),
    "swap: block size": (
        lambda m: swap_attention(m, "local_global", window=4, block_size=0),
        ValueError,
        "block_size=0 .*at least 1",
    ),
    "swap: seed": (lambda m: swap_attention(m, "local_global", window=4, seed=-3), ValueError, "seed=-3"),
    "swap: mqa on groups": (
        lambda m: swap_attention(m, "mqa"),
        ValueError,
        r"1 key/value head but the layer has 4; call convert_to_mqa\(model\) first, or use 'gqa'",
    ),
    "swap: layer 2": (lambda m: swap_attention(m, "flash", layers=[2]), ValueError, "layer 2 .*layers 0 to 1"),
    "swap: layer -1": (lambda m: swap_attention(m, "flash", layers=[-1]), ValueError, "layer -1 .*layers 0 to 1"),
    "swap: layer bool": (lambda m: swap_attention(m, "flash", layers=[True]), ValueError, "layer True .*layers 0 to 1"),
    "swap: layer name": (lambda m: swap_attention(m, {"0": "flash"}), ValueError, "layer '0' .*layers 0 to 1"),
    "swap: layers a number": (lambda m: swap_attention(m, "flash", layers=1), (TypeError, ValueError), "layers"),
    "swap: no layers": (lambda m: swap_attention(m, "flash", layers=[]), ValueError, "no layer to swap"),
    "swap: empty mapping": (lambda m: swap_attention(m, {}), ValueError, "no layer to swap"),
    "swap: mapping and layers": (
        lambda m: swap_attention(m, {0: "flash"}, layers=[1]),
        ValueError,
        r"layers cannot be given next to a mapping; write \{layer: \(name, options\)\}",
    ),
    "swap: mapping and option": (
        lambda m: swap_attention(m, {0: "flash"}, window=3),
        ValueError,
        "window cannot be given next to a mapping",
    ),
    "swap: options twice": (
        lambda m: swap_attention(m, ("sliding_window", {"window": 3}), window=3),
        ValueError,
        "options are given twice",
    ),
    "swap: second layer bad": (
        lambda m: swap_attention(m, {0: "flash", 1: ("sliding_window", {"window": 0})}),
        ValueError,
        "window=0",
    ),
    "restore: nothing": (restore_attention, ValueError, r"no swapped attention to restore \(it runs 'sdpa'\)"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "causal", 8, 4)


@pytest.mark.parametrize(("call", "error", "message"), MODEL.values(), ids=MODEL)
def test_bad_argument(model: Any, call: Callable, error: type[Exception], message: str) -> None:
    with unchanged(model), pytest.raises(error, match=f"(?s){message}"):
        call(model)


def test_layers_beside_an_attention_without_tensor_masks() -> None:
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    message = r"layers \[1\] would keep 'flex_attention'.*swap all layers, or load .*attn_implementation='sdpa'"
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "flash", layers=[0])
