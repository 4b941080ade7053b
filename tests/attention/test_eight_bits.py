"""Caches in 8 bits: attention over the rounded keys and values is exact, however a text was cut into calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.caching import in_steps, positions, whole
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from hf_attnkit import load_pretrained, swap_attention
from hf_attnkit.attention import eight_bits, proof_cached
from hf_attnkit.attention.kernels import packed
from hf_attnkit.attention.kind import ATTRIBUTE
from hf_attnkit.models.interface import Call, watched
from hf_attnkit.models.layers import attention_layers

LENGTH, MAXIMUM, WINDOW, SINKS = 40, 64, 5, 3
BITS = ("int8", "float8_e4m3fn")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "flash": ("flash", {}),
    "gqa": ("gqa", {}),
    "flash window": ("flash", {"window": WINDOW}),
    "window": ("sliding_window", {"window": WINDOW}),
    "sinks": ("sliding_window", {"window": WINDOW, "num_sink_tokens": SINKS}),
    "streaming heads": ("streaming_heads", {"heads": [1], "window": WINDOW, "num_sink_tokens": SINKS}),
}
CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=MAXIMUM),
}
# Float64: differences are rounding, of sums over at most 40 keys through two layers; a number that rounds to another
# step moves the logits by 0.01 and more.
TOLERANCE = 1e-11

every_bits = pytest.mark.parametrize("bits", BITS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_cache = pytest.mark.parametrize("cache", CACHES)


def rounded(states: Tensor, bits: str) -> Tensor:
    """By definition: the nearest multiple of the step, or the nearest of float8's numbers, all 253 looked through."""
    limit = 127 if bits == "int8" else 448
    scale = (states.float().abs().amax(-1, keepdim=True) / limit).bfloat16().to(states.dtype)
    if bits == "int8":
        numbers = torch.arange(-127, 128)
    else:
        small = [(mantissa / 8) * 2.0**-6 for mantissa in range(8)]
        large = [(1 + mantissa / 8) * 2.0 ** (e - 7) for e in range(1, 16) for mantissa in range(8)][:-1]
        numbers = torch.tensor([*small, *large, *(-x for x in small[1:] + large)])
    numbers = numbers.to(states.dtype)
    ratio = states / scale.where(scale > 0, 1)
    return numbers[(ratio[..., None] - numbers).abs().argmin(-1)] * scale


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    torch.manual_seed(0)
    return build("llama", "causal", heads=4, kv_heads=2).double()


def swapped(stock: PreTrainedModel, kind: str, **more: Any) -> PreTrainedModel:
    name, options = KINDS[kind]
    return swap_attention(copy.deepcopy(stock), name, **options, **more)


def text(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    inputs = batch(model, (LENGTH, LENGTH - 7, LENGTH - 12))
    return inputs["input_ids"], inputs["attention_mask"]


@contextmanager
def rounding(model: PreTrainedModel, bits: str) -> Iterator[None]:
    """Each attention gets rounded keys and values; nothing else changes."""

    def round_first(call: Call) -> tuple[Tensor, Any]:
        call.key, call.value = rounded(call.key, bits), rounded(call.value, bits)
        return call.run()

    with watched([layer.module for layer in attention_layers(model)], round_first):
        yield


def expected(stock: PreTrainedModel, kind: str, bits: str, ids: Tensor, mask: Tensor) -> Tensor:
    """One pass without a cache of the same kind in floats, over rounded keys and values."""
    model = swapped(stock, kind)
    with rounding(model, bits):
        return whole(model, ids, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_bits
def test_numbers_come_back_rounded(bits: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(2, 3, 7, 16, generator=generator) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    states[0, 0, 0] = 0
    found = eight_bits.decode(eight_bits.encode(states, bits), dtype)
    assert found.dtype == dtype and eight_bits.encode(states, bits).nbytes == 2 * 3 * 7 * (16 + 2)
    # A product of the same two numbers, rounded. Half-way between two steps either is right.
    double = states.double()
    assert ((found.double() - double).abs() <= eight_bits.most_off(states, bits)).all()
    exact = rounded(double, bits)
    scale = double.abs().amax(-1, keepdim=True)
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * scale).double().mean() > 0.95
    assert (found[0, 0, 0] == 0).all()


@every_bits
def test_what_is_not_finite_stays_so(bits: str) -> None:
    states = torch.ones(1, 1, 3, 4)
    states[0, 0, 0, 1], states[0, 0, 1, 2] = torch.inf, torch.nan
    found = eight_bits.decode(eight_bits.encode(states, bits), torch.float32)
    assert not found[0, 0, :2].isfinite().any() and (found[0, 0, 2] - 1).abs().max() < 0.01


@every_cache
@every_bits
@every_kind
def test_attention_over_the_rounded_keys_is_exact(stock: PreTrainedModel, kind: str, bits: str, cache: str) -> None:
    model = swapped(stock, kind, cache_dtype=bits)
    ids, mask = text(model)
    real = mask.bool()
    wanted = expected(stock, kind, bits, ids, mask)[real]
    assert (wanted - whole(model, ids, mask)[real]).abs().max() > 0.01  # rounding matters here
    for steps in ([LENGTH], [7] + [1] * 33, [13, 1, 18, 8]):
        found = in_steps(model, ids, mask, CACHES[cache](model), steps)[real]
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("kind", ["flash", "sinks", "streaming heads"])
def test_rows_follow_their_texts(stock: PreTrainedModel, kind: str, operation: str) -> None:
    model = swapped(stock, kind, cache_dtype="int8")
    ids, mask = text(model)
    made = DynamicCache(config=model.config)
    in_steps(model, ids[:, :30], mask[:, :30], made, [20, 10])
    rows = {"reorder_cache": [2, 0, 2], "batch_select_indices": [2, 0], "batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}
    chosen = torch.tensor(rows[operation])
    getattr(made, operation)(2 if operation == "batch_repeat_interleave" else chosen)
    wanted = expected(stock, kind, "int8", ids, mask)[chosen, 30:]
    ids, mask = ids[chosen], mask[chosen]
    found = [
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=positions(mask)[:, at : at + 1],
              past_key_values=made).logits
        for at in range(30, LENGTH)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=TOLERANCE)


def test_beams_and_a_static_cache_generate_alike(stock: PreTrainedModel) -> None:
    model = swapped(stock, "streaming heads", cache_dtype="int8")
    ids, mask = text(model)
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    dynamic = model.generate(ids, **common)
    static = model.generate(ids, **common, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)
    with rounding(plain := swapped(stock, "streaming heads"), "int8"):
        assert torch.equal(plain.generate(ids, **common, use_cache=False), dynamic)


def kept_bytes(cache: Cache) -> int:
    """What the memory of all of its tensors takes, each once, whatever part of it they show."""
    parts = [part for layer in cache.layers for part in (getattr(layer, "far", layer), getattr(layer, "near", layer))]
    stores = [states.untyped_storage() for part in parts for states in (part.keys, part.values)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


@every_cache
@every_bits
@pytest.mark.parametrize("kind", ["flash", "window", "sinks", "streaming heads"])
def test_bytes(stock: PreTrainedModel, kind: str, bits: str, cache: str) -> None:
    models = [swapped(stock, kind, **more).float() for more in ({}, {"cache_dtype": bits})]
    ids, mask = text(models[0])
    sizes = []
    for model in models:
        made = CACHES[cache](model)
        in_steps(model, ids, mask, made, [20] + [1] * 20)
        sizes.append(kept_bytes(made))
    if kind == "flash" and cache == "dynamic":  # in the model's dtype Transformers' layer, whose memory has no room
        assert sizes[0] == 2 * 2 * 3 * 2 * LENGTH * 16 * 4
        sizes[0] = sizes[0] // LENGTH * 256
    # Heads of 16 numbers, float32: 64 bytes, or 16 and 2 of the scale.
    assert sizes[1] / sizes[0] == 18 / 64


@every_bits
def test_a_step_decodes_block_by_block(stock: PreTrainedModel, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped(stock, "flash", cache_dtype=bits)
    ids, mask = text(model)
    wanted = in_steps(model, ids, mask, DynamicCache(config=model.config), [LENGTH - 1, 1])
    tokens, decode = [], eight_bits.decode

    def counted(states: Tensor, dtype: torch.dtype) -> Tensor:
        tokens.append(states.shape[2])
        return decode(states, dtype)

    made = DynamicCache(config=model.config)
    first = in_steps(model, ids[:, :-1], mask[:, :-1], made, [LENGTH - 1])
    monkeypatch.setattr(eight_bits, "BLOCK", 7)
    monkeypatch.setattr(eight_bits, "decode", counted)
    last = model(ids[:, -1:], attention_mask=mask, position_ids=positions(mask)[:, -1:], past_key_values=made).logits
    assert max(tokens) == 7 and sum(tokens) == 2 * 2 * LENGTH  # keys and values of two layers
    torch.testing.assert_close(torch.cat([first, last], 1), wanted, rtol=0, atol=TOLERANCE)


def test_a_gradient_goes_around(stock: PreTrainedModel) -> None:
    """A pass that takes gradients attends to what it was given, as without a cache; a later one cannot."""
    model = swapped(stock, "sinks", cache_dtype="int8")
    ids, mask = text(model)
    with torch.enable_grad():
        grads = []
        for more in ({"use_cache": False}, {"past_key_values": (made := DynamicCache(config=model.config))}):
            model.zero_grad()
            model(ids, attention_mask=mask, labels=ids, **more).loss.backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match=r"holds 40 tokens as 'int8', .* torch\.no_grad\(\)"):
            model(ids[:, :1], past_key_values=made)


def test_frozen_keys_and_a_gradient_of_the_queries(stock: PreTrainedModel) -> None:
    model = swapped(stock, "flash", cache_dtype="int8").requires_grad_(False)
    ids = text(model)[0]
    with torch.enable_grad():
        model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
        with rounding(plain := swapped(stock, "flash").requires_grad_(False), "int8"):
            plain.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
            plain(ids, labels=ids, use_cache=False).loss.backward()
        model(ids, labels=ids, use_cache=True).loss.backward()
    found, wanted = (each.model.layers[1].self_attn.q_proj.weight.grad for each in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@every_bits
def test_saved_and_loaded(stock: PreTrainedModel, bits: str, tmp_path: Any) -> None:
    model = swapped(stock, "sinks", cache_dtype=bits)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert getattr(again.model.layers[1].self_attn, ATTRIBUTE).cache_dtype == bits
    ids, mask = text(model)
    found = [in_steps(each, ids, mask, DynamicCache(config=each.config), [30, 10]) for each in (model, again.double())]
    assert torch.equal(*found)


@pytest.mark.parametrize("word", ["int4", "bfloat16", torch.int8, 8, True])
@every_kind
def test_other_words(stock: PreTrainedModel, kind: str, word: Any) -> None:
    model = copy.deepcopy(stock)
    name, options = KINDS[kind]
    with unchanged(model), pytest.raises(ValueError, match=r"cache_dtype=.* must be one of 'int8', 'float8_e4m3fn'"):
        swap_attention(model, name, **options, cache_dtype=word)


@pytest.mark.parametrize(
    ("family", "head", "options", "message"),
    [
        ("bert", "base", {}, r"layer 0 .*cache_dtype='int8' .* not causal and keeps none"),
        ("bart", "base", {"layers": [0]}, r"not causal"),
        ("bart", "base", {"layers": [5]}, r"cross-attention keeps the encoder's keys; name the decoder's"),
        ("t5", "base", {"layers": [2]}, r"position bias is made for the keys of Transformers' cache"),
    ],
)
def test_where_no_cache_of_ours_is(family: str, head: str, options: dict, message: str) -> None:
    model = build(family, head)
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "flash", cache_dtype="int8", **options)


def test_a_window_of_the_model(stock: PreTrainedModel) -> None:
    model = build("mistral", "causal", heads=4, kv_heads=2, sliding_window=9)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"a window of its own, 9 tokens; set config\.sliding_window"),
    ):
        swap_attention(model, "flash", cache_dtype="int8")


def test_caches_of_another_precision_are_refused(stock: PreTrainedModel) -> None:
    ids = text(stock)[0]
    model = swapped(stock, "window")
    made = model(ids[:, :9], use_cache=True).past_key_values
    for bits in BITS:
        swap_attention(model, "sliding_window", window=WINDOW, cache_dtype=bits)
        with pytest.raises(ValueError, match="start with a new cache"):
            model(ids[:, 9:], past_key_values=made)
        made = model(ids[:, :9], use_cache=True).past_key_values


@every_kind
def test_quantized_caches_of_transformers(stock: PreTrainedModel, kind: str) -> None:
    """The same as of the stock model where the layer is Transformers' own, else an error."""
    ids = text(stock)[0]
    for more in ({}, {"cache_dtype": "int8"}):
        model = swapped(stock, kind, **more)
        made = QuantizedCache("fp8", config=model.config)
        if kind in ("flash", "gqa") and not more:
            theirs = QuantizedCache("fp8", config=stock.config)
            for part in ids.split([21, 1, 1, 17], dim=1):
                found, wanted = model(part, past_key_values=made).logits, stock(part, past_key_values=theirs).logits
                torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
            assert all("Quantized" in type(layer).__name__ for layer in made.layers)
            continue
        with pytest.raises(ValueError, match=r"layer 0 runs .* cache layer of its own.* option cache_dtype"):
            model(ids, past_key_values=made)


def too_coarse(states: Tensor, bits: str) -> Tensor:
    encoded = encode(states, bits)
    numbers, scale = encoded[..., :-2], encoded[..., -2:]
    return torch.cat([numbers - 1, scale], -1)


encode = eight_bits.encode


def test_the_proof_sees_numbers_that_are_kept_wrong(stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_attnkit.attention.cache.encode", too_coarse)
    model = copy.deepcopy(stock)
    with unchanged(model), pytest.raises(ValueError, match=r"keeps keys in 'int8' .* further .* than half a step"):
        swap_attention(model, "flash", cache_dtype="int8")


def test_the_proof_sees_a_kernel_that_reads_them_wrong(stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(states: Tensor, dtype: torch.dtype) -> Tensor:
        found = eight_bits.decode(states, dtype)
        return found.roll(1, -1) if eight_bits.is_encoded(states) else found

    monkeypatch.setattr("hf_attnkit.attention.kernels.backends.decode", shifted)
    model = copy.deepcopy(stock)
    with unchanged(model), pytest.raises(ValueError, match=r"differs by .* from attention to the keys that it keeps"):
        swap_attention(model, "flash", cache_dtype="int8")


def test_the_proof_sees_a_model_without_a_cache(stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_cached, "is_encoded", lambda states: False)
    with pytest.raises(ValueError, match="runs without a cache, so cache_dtype would do nothing"):
        swap_attention(copy.deepcopy(stock), "flash", cache_dtype="int8")


def test_floats_take_the_path_that_they_took() -> None:
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    assert packed._products(query[:, :2], key).equal(query[:, :2] @ key.transpose(-1, -2))
    assert eight_bits.decode(value, torch.float64) is value
