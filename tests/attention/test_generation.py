"""Swapped models with a cache: prefill and decoding give what one pass without a cache gives."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.caching import in_steps, whole
from support.matrix import EXACT, MATRIX, WITH_FAMILY
from support.models import batch, build
from support.swapping import TERMS, build_for, swapped
from transformers import DynamicCache, PreTrainedModel, StaticCache

NEW = 8


KINDS = [(name, family, MATRIX[name].options) for name, family in WITH_FAMILY]


every_kind = pytest.mark.parametrize(
    ("name", "family", "options"), KINDS, ids=lambda x: x if isinstance(x, str) else ""
)


def decoder(name: str, family: str, **options: Any) -> PreTrainedModel:
    if family == "bert":
        return build("bert", "causal")
    return build_for(name, family, "causal", **options)


@functools.cache  # what a run leaves is in its cache
def shared(name: str, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The swapped model, and the same in float64."""
    ours = swapped(decoder(name, family), name, **MATRIX[name].options)
    return ours, copy.deepcopy(ours).double()


STEPS = {"prefill": [9] + 11 * [1], "chunks": [6, 7, 1, 6], "tokens": 20 * [1]}
# Llama with all of them; BERT with one half and Mistral with the other.
STEP_BY_STEP = [
    (name, family, cache, steps)
    for name, family in WITH_FAMILY
    for number, (cache, steps) in enumerate(itertools.product(("dynamic", "static"), STEPS))
    if family == "llama" or number % 2 == (family == "bert")
]


@pytest.mark.parametrize(("name", "family", "cache", "steps"), STEP_BY_STEP)
def test_cache_equals_one_pass(name: str, family: str, cache: str, steps: str) -> None:
    ours, precise = shared(name, family)
    inputs = batch(ours, (20, 12, 16))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    made = DynamicCache(config=ours.config) if cache == "dynamic" else StaticCache(ours.config, max_cache_len=32)
    real = mask.bool()
    with torch.no_grad():
        one = whole(ours, ids, mask)[real]
        exact = whole(precise, ids, mask)[real]
        assert_as_accurate(in_steps(ours, ids, mask, made, STEPS[steps])[real], one, exact, terms=TERMS)


@every_kind
def test_greedy_generation_equals_a_loop_without_cache(name: str, family: str, options: dict) -> None:
    model = swapped(decoder(name, family), name, **options)
    inputs = batch(model, (14, 9))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        for _ in range(NEW):
            chosen = whole(model, ids, mask)[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, chosen], dim=1), torch.cat([mask, torch.ones_like(chosen)], dim=1)
    assert torch.equal(generated, ids)


@every_kind
def test_left_padded_batch_equals_each_text_alone(name: str, family: str, options: dict) -> None:
    model = swapped(decoder(name, family), name, **options)
    lengths = (14, 9, 4)
    inputs = batch(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    together = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=NEW, do_sample=False,
                               attention_mask=mask[row : row + 1, -length:])  # fmt: skip
        assert torch.equal(together[row, -length - NEW :], alone[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
@pytest.mark.parametrize("name", EXACT)
def test_generation_equals_stock(name: str, options: dict) -> None:
    model = build_for(name, "llama", "causal")
    inputs = batch(model)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True} | options
    expected = model.generate(**inputs, **settings)
    assert torch.equal(swapped(model, name).generate(**inputs, **settings), expected)


@pytest.mark.parametrize("name", EXACT)
def test_mistral_beyond_its_own_window(name: str) -> None:
    """Its cache keeps only the window; the mask is handed over as a matrix."""
    model = build_for(name, "mistral", "causal", sliding_window=8)
    inputs = batch(model, (13, 6))
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    ours = swapped(model, name)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("steps", [[9] + 11 * [1], [6, 7, 1, 6], [3, 17]], ids=["prefill", "chunks", "long"])
@pytest.mark.parametrize("name", EXACT)
def test_cache_of_mistral_with_a_window(name: str, steps: list[int]) -> None:
    model = build_for(name, "mistral", "causal", sliding_window=5)
    ours = swapped(model, name)
    inputs = batch(model, (20, 15))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real = mask.bool()
    with torch.no_grad():
        one, exact = whole(model, ids, mask)[real], whole(copy.deepcopy(model).double(), ids, mask)[real]
        steps_out = in_steps(ours, ids, mask, DynamicCache(config=ours.config), steps)[real]
    assert_as_accurate(steps_out, one, exact, terms=TERMS)
