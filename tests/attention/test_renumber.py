"""Positions that count within the cache, against their definition: each query's kept keys are rotated for it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.caching import in_steps, whole
from support.every_type import small_model
from support.models import batch, build
from support.unchanged import unchanged
from torch import Tensor
from torch.nn.functional import silu
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hf_attnkit import load_pretrained, restore_attention, swap_attention
from hf_attnkit.attention.kernels.rotation import Rotation
from hf_attnkit.attention.kind import ATTRIBUTE, ROTATION, Call
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask

LENGTH, MAXIMUM, WINDOW, SINKS = 40, 64, 5, 3
OPTIONS = {"window": WINDOW, "num_sink_tokens": SINKS, "renumber": True}
CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=MAXIMUM),
}
# Float64, but for the model's own cosines of its positions, which are of float32 angles: off by 2**-24 of up to 40.
TOLERANCE = 1e-4
# Between two ways through the same cosines only float64 rounds.
SAME = 1e-11


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return build("llama", "causal", heads=4, kv_heads=2, max_position_embeddings=16).double()


def swapped(stock: PreTrainedModel, **more: Any) -> PreTrainedModel:
    return swap_attention(copy.deepcopy(stock), "sliding_window", **(OPTIONS | more))


def text(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    inputs = batch(model, (LENGTH, LENGTH - 7, LENGTH - 12))
    return inputs["input_ids"], inputs["attention_mask"]


def rotated(states: Tensor, position: Tensor, theta: float) -> Tensor:
    """Llama's rotary embedding, one position for each of the tokens on the last axis but one."""
    half = states.shape[-1] // 2
    angle = position[:, None] * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def streaming_llm(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of one text `(T,)`: each query in each layer attends to its kept keys, which are at 0, 1, 2 ..."""
    inner, heads = model.model, model.config.num_attention_heads
    theta = model.config.rope_parameters["rope_theta"]
    hidden = inner.embed_tokens(ids)
    for layer in inner.layers:
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            (projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key, value = (states.repeat_interleave(heads // len(key), 0) for states in (key, value))
        outputs = []
        for at in range(len(ids)):
            kept = [place for place in range(at + 1) if place < SINKS or at - place < WINDOW]
            position = torch.arange(len(kept)).double()
            one = rotated(query[:, at : at + 1], position[-1:], theta)
            scores = one @ rotated(key[:, kept], position, theta).mT / attention.head_dim**0.5
            outputs.append((scores.softmax(-1) @ value[:, kept]).flatten())
        hidden = hidden + attention.o_proj(torch.stack(outputs))
        normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        hidden = hidden + mlp.down_proj(silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return model.lm_head(inner.norm(hidden))


@pytest.fixture(scope="module")
def reference(stock: PreTrainedModel) -> Tensor:
    """Of the batch's real tokens, each text alone."""
    ids, mask = text(stock)
    with torch.no_grad():
        return torch.cat([streaming_llm(stock, row[real]) for row, real in zip(ids, mask.bool(), strict=True)])


def test_one_pass_is_streaming_llm(stock: PreTrainedModel, reference: Tensor) -> None:
    ids, mask = text(stock)
    real = mask.bool()
    found = whole(swapped(stock), ids, mask)[real]
    torch.testing.assert_close(found, reference, rtol=0, atol=TOLERANCE)
    kept = whole(swapped(stock, renumber=False), ids, mask)
    assert (kept[real] - found).abs().max() > 0.1
    short = ids[:1, : SINKS + WINDOW], mask[:1, : SINKS + WINDOW]  # all of it fits into the cache
    torch.testing.assert_close(whole(swapped(stock), *short), whole(stock, *short), rtol=0, atol=SAME)


@pytest.mark.parametrize("cache", CACHES)
def test_split_equals_one_pass(stock: PreTrainedModel, cache: str, reference: Tensor) -> None:
    model = swapped(stock)
    ids, mask = text(model)
    real = mask.bool()
    wanted = whole(model, ids, mask)[real]
    for steps in ([LENGTH], [1] * LENGTH, [20] + [1] * 20, [13, 9, 18], [7, 33], [1, 1, 30, 8]):
        found = in_steps(model, ids, mask, CACHES[cache](model), steps)[real]
        torch.testing.assert_close(found, wanted, rtol=0, atol=SAME)


@pytest.mark.parametrize("family", ["cohere", "glm", "gpt_neox"])
def test_neighbours_as_pairs_and_heads_rotated_in_part(family: str) -> None:
    stock = build(family, "causal", heads=4).double()
    model = swapped(stock)
    ids, mask = text(model)
    real = mask.bool()
    wanted = whole(model, ids, mask)[real]
    found = in_steps(model, ids, mask, DynamicCache(config=model.config), [20] + [1] * 20)[real]
    torch.testing.assert_close(found, wanted, rtol=0, atol=SAME)
    assert (whole(swapped(stock, renumber=False), ids, mask)[real] - wanted).abs().max() > 0.01


@pytest.mark.parametrize("interleaved", [False, True])
def test_back_undoes_a_rotation(interleaved: bool) -> None:
    frequencies = torch.tensor([1.0, 0.1])
    states = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    at = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 100_000]])
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    moved = states.clone()
    for frequency, (a, b) in zip(frequencies.double(), pairs, strict=True):
        turn = torch.polar(torch.ones(2, 1, 4, dtype=torch.float64), at[:, None] * frequency)
        both = torch.complex(states[..., a], states[..., b]) * turn
        moved[..., a], moved[..., b] = both.real, both.imag
    found = Rotation(frequencies, interleaved).back(moved, at)
    torch.testing.assert_close(found, states, rtol=0, atol=1e-9)


def test_generation_past_the_trained_length_in_flat_memory(stock: PreTrainedModel) -> None:
    model = swapped(stock)
    ids = text(model)[0][:1, :6]
    made, sizes = DynamicCache(config=model.config), []
    for _ in range(60):  # trained for 16 positions
        seen = int(made.get_seq_length())
        ids = torch.cat([ids, model(ids[:, seen:], past_key_values=made).logits[:, -1:].argmax(-1)], 1)
        stored = (states.untyped_storage() for each in made.layers for states in (each.keys, each.values))
        sizes.append(sum(store.nbytes() for store in stored))
    assert set(sizes[WINDOW + SINKS :]) == {2 * 2 * 2 * (SINKS + WINDOW - 1) * 16 * 8}
    wanted = streaming_llm(model, ids[0])[5:-1].argmax(-1)
    assert torch.equal(ids[0, 6:], wanted)
    for more in ({"num_beams": 1}, {"cache_implementation": "static", "disable_compile": True}):
        generated = model.generate(ids[:, :6], max_new_tokens=60, do_sample=False, eos_token_id=None, **more)
        assert torch.equal(generated, ids)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 3, "use_cache": False}], ids=str)
def test_padded_beams(stock: PreTrainedModel, more: dict[str, Any]) -> None:
    model = swapped(stock)
    ids, mask = text(model)
    common = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **common, **more)
    for row, real in enumerate(mask.bool()):
        alone = model.generate(ids[row][real][None], **common, num_beams=3)
        assert torch.equal(together[row, -9:], alone[0, -9:])


def test_in_8_bits(stock: PreTrainedModel) -> None:
    """No key is rotated again, so none is rounded again: what is kept does not depend on the steps."""
    model = swapped(stock, cache_dtype="int8")
    ids, mask = text(model)
    real = mask.bool()
    found = [
        in_steps(model, ids, mask, CACHES[cache](model), steps)[real]
        for cache in CACHES
        for steps in ([LENGTH], [7] + [1] * 33)
    ]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=SAME)
    assert 0.001 < (found[0] - whole(model, ids, mask)[real]).abs().mean() < 0.5


def test_packed_documents_are_as_if_alone(stock: PreTrainedModel) -> None:
    model = swapped(stock)
    ids = text(model)[0][:1]
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    found = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in ids.split([17, 23], 1)]
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [2 * WINDOW - 1, 150])
def test_gradients_are_those_of_one_expression(length: int) -> None:
    """Of few keys by a matrix, of many by tiles."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    weight = torch.randn(2, 4, length, 8, generator=generator, dtype=torch.float64)
    mask = Mask.aligned(length, length, is_causal=True, key_visible=(torch.arange(length) >= torch.tensor([[0], [4]])))
    kind, call = SlidingWindowAttention(**OPTIONS), Call(rotation=Rotation(torch.tensor([1.0, 0.3]), False))
    results = []
    with torch.enable_grad():
        for run in (lambda *each, **more: kind.attention(*each, **more)[0], kind.of_any_length):
            output = run(*inputs, mask, scaling=0.3, call=call)
            results.append([output, *torch.autograd.grad((output * weight)[1:, :, 4:].sum() + output[0].sum(), inputs)])
    assert results[0][0].isfinite().all()
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_dropout_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3))
    kind, call = SlidingWindowAttention(**OPTIONS), Call(rotation=Rotation(torch.tensor([1.0]), False))
    mask = Mask.aligned(40, 40, is_causal=True)
    exact = kind.attention(query, key, value, mask, scaling=0.3, call=call)[0]
    torch.manual_seed(0)
    drawn = torch.stack([
        kind.attention(query, key, value, mask, scaling=0.3, dropout=0.3, call=call)[0] for _ in range(300)
    ])  # fmt: skip
    assert (drawn.std(0) > 0.01).double().mean() > 0.9
    error = drawn.std(0) / 300**0.5
    assert ((drawn.mean(0) - exact).abs() < 5 * error + 1e-6).all()


def test_saved_loaded_and_restored(stock: PreTrainedModel, tmp_path: Any) -> None:
    model = swapped(stock)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).double()
    attention = again.model.layers[1].self_attn
    assert getattr(attention, ATTRIBUTE).renumber is True
    ids, mask = text(model)
    assert torch.equal(whole(again, ids, mask), whole(model, ids, mask))
    restore_attention(again)
    assert ROTATION not in attention.__dict__


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {}, r"renumber=True is about a cache .* not causal"),
        ("gpt2", {}, r"has no rotary position embedding; use renumber=False"),
        ("mistral", {"sliding_window": 9}, r"renumber=True .* a window of its own, 9 tokens"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         r"depend on the length \('dynamic' scaling\)"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                                       "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                                       "original_max_position_embeddings": 64}},
         r"depend on the length \('longrope' scaling\)"),
    ],
)  # fmt: skip
def test_where_positions_do_not_turn(family: str, options: dict[str, Any], message: str) -> None:
    grouped = {} if family in ("bert", "gpt2") else {"kv_heads": 2}
    model = build(family, "causal" if family != "bert" else "base", heads=4, **grouped, **options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "sliding_window", **OPTIONS)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("opt", "has no rotary position embedding"),
        ("gemma2", "renumber=True"),
        ("smollm3", r"layer 1 .* do not move with their positions .* name other layers with layers=\[\.\.\.\]"),
    ],
)
def test_other_types_where_they_do_not(model_type: str, message: str) -> None:
    model = small_model(model_type)
    if model_type == "smollm3":
        model.model.layers[1].self_attn.use_rope = 0
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "sliding_window", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sink_tokens": 0}, "renumber=True moves the query towards the sinks.*give num_sink_tokens=4"),
        ({"renumber": 1}, "renumber=1 must be True or False"),
        ({"renumber": "yes"}, "renumber='yes' must be True or False"),
    ],
)
def test_bad_options(stock: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    model = copy.deepcopy(stock)
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap_attention(model, "sliding_window", **(OPTIONS | options))


def test_the_proof_sees_a_rotation_that_is_wrong(stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    back = Rotation.back
    monkeypatch.setattr(Rotation, "back", lambda self, states, by: back(self, states, -by))
    model = copy.deepcopy(stock)
    with unchanged(model), pytest.raises(ValueError, match="queries do not move with their positions"):
        swap_attention(model, "sliding_window", **OPTIONS)


def test_a_rotation_is_needed() -> None:
    states = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="needs the rotation of queries and keys, which swap_attention finds"):
        kind = SlidingWindowAttention(**OPTIONS)
        kind.attention(states, states, states, Mask.aligned(3, 3, is_causal=True), scaling=1.0)
