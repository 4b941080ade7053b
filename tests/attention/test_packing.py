"""Packed rows: every document as if it were alone, in attention, scores, statistics and refits; else refused."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from support.matrix import MATRIX
from support.models import build
from support.refits import plain
from support.swapping import build_for, swapped
from torch import Tensor
from transformers import DynamicCache

from hf_attnkit import convert_to_gqa, head_gradients, head_importance, head_statistics, prune_heads
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.packing import starts

LENGTHS = ((9, 13, 1, 6), (4, 4, 20, 1))
SOFTMAX = [name for name in MATRIX if MATRIX[name].kind.forms_scores]
# Rounding in float64 over two layers; a leak between documents moves the outputs by about 1.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def packed(seed: int = 0) -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """Tokens and positions `(2, 29)`, and where the documents are."""
    ids = torch.randint(3, 90, (2, sum(LENGTHS[0])), generator=torch.Generator().manual_seed(seed))
    position = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    places = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        places += [(row, slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    return ids, position, places


def test_starts_are_where_positions_do_not_follow() -> None:
    _, position, places = packed()
    found = starts(position)
    assert found is not None
    assert found.nonzero().tolist() == [[row, place.start] for row, place in places if place.start]
    assert starts(torch.arange(5)[None]) is None and starts(None) is None
    padded = torch.tensor([[1, 1, 0, 1, 2]])  # as generate makes them
    assert starts(padded, torch.tensor([[0, 0, 1, 1, 1]])) is None
    assert starts(padded[:, 1:], torch.tensor([[0, 0, 1, 1, 1]])) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("name", MATRIX)
@torch.no_grad()
def test_documents_are_as_if_alone(name: str, family: str) -> None:
    if name == "mqa" and family == "gpt2":
        pytest.skip("its heads cannot be merged")
    model = swapped(build_for(name, family, "causal").double(), name, **MATRIX[name].options)
    ids, position, places = packed()
    for options in ({}, {"use_cache": False}):
        found = model(ids, position_ids=position, **options)
        assert found.past_key_values is None
        for row, place in places:
            alone = model(ids[row : row + 1, place], use_cache=False).logits
            torch.testing.assert_close(found.logits[row : row + 1, place], alone, **EXACT)


@pytest.mark.parametrize("name", SOFTMAX)
@torch.no_grad()
def test_matrices_that_keep_documents_apart(name: str) -> None:
    """An encoder, whose documents only a matrix tells apart."""
    model = swapped(build_for(name, "bert").double(), name, **MATRIX[name].options)
    ids, position, places = packed()
    apart = torch.zeros(2, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for row, place in places:
        apart[row, 0, place, place] = True
    found = model(ids, attention_mask=apart, position_ids=position).last_hidden_state
    for row, place in places:
        alone = model(ids[row : row + 1, place]).last_hidden_state
        torch.testing.assert_close(found[row : row + 1, place], alone, **EXACT)


@pytest.mark.parametrize("name", ["flash", "sliding_window"])
def test_what_would_join_them_is_refused(name: str) -> None:
    model = swapped(build("llama", "causal"), name, **MATRIX[name].options)
    ids, position, _ = packed()
    with pytest.raises(ValueError, match=r"several documents.*a cache"):
        model(ids, position_ids=position, use_cache=True)
    with pytest.raises(ValueError, match=r"several documents.*a cache"):
        model(ids, position_ids=position, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"several documents.*an attention_mask"):
        model(ids, position_ids=position, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match=r"packed.*leave attention_mask out"):
        batch = {"input_ids": ids, "position_ids": position, "attention_mask": torch.ones_like(ids)}
        head_importance(build("llama", "causal"), [batch], method="entropy")


def batches(with_cache: bool) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """The same documents packed and one by one; those of one token, which say nothing, in neither."""
    ids, position, places = packed()
    flag = {"use_cache": True} if with_cache else {}
    whole = [{"input_ids": ids, "position_ids": position, **flag}]
    return whole, [{"input_ids": ids[row : row + 1, place]} for row, place in places]


@pytest.mark.parametrize("kind", [None, "sliding_window, sinks", "local_global, random blocks"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_scores_and_statistics_are_those_of_the_documents(kind: str | None, with_cache: bool) -> None:
    model = build("llama", "causal").double()
    model = model if kind is None else swapped(model, kind, **MATRIX[kind].options)
    whole, alone = batches(with_cache)
    for method in ("entropy", "confidence", "contribution"):
        found, wanted = (head_importance(model, given, method=method) for given in (whole, alone))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found, wanted = (head_statistics(model, given) for given in (whole, alone))
    for name in ("entropy", "confidence", "distance", "previous", "first", "redundancy"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("with_cache", [False, True])
def test_gradients_are_those_of_the_documents(with_cache: bool) -> None:
    """A row's loss is the mean over its tokens, so its gradient is the documents' weighted by their tokens; the first
    token of each is predicted by nothing."""
    model = build("llama", "causal").double()
    whole, alone = batches(with_cache)
    found = head_gradients(model, whole)
    for row, lengths in enumerate(LENGTHS):
        mine = alone[row * len(LENGTHS[0]) : (row + 1) * len(LENGTHS[0])]
        terms = [length - 1 for length in lengths]
        parts = [n * head_gradients(model, [b])[0] for n, b in zip(terms, mine, strict=True) if n]
        torch.testing.assert_close(found[row], torch.stack(parts).sum(0) / sum(terms), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_cache", [False, True])
def test_refits_are_those_of_the_documents(with_cache: bool) -> None:
    models = []
    for given in batches(with_cache):
        model = build("llama", "causal").double()
        models.append(convert_to_gqa(model, 2, method="mean", calibration=given, refit=plain("output")))
    for found, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_a_config_that_names_removed_heads_alone() -> None:
    """Rows without a mask, which may be packed, of a model whose config says of heads and of no kinds."""
    model = prune_heads(build("llama", "causal"), {0: [1]})
    ids, _, _ = packed()
    found, masked = (head_importance(model, [inputs], method="entropy") for inputs in (
        {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ))  # fmt: skip
    torch.testing.assert_close(found, masked, equal_nan=True)  # a removed head has no score
    convert_to_gqa(build("llama", "causal"), 4, calibration=[{"input_ids": ids}])


@torch.no_grad()
@pytest.mark.parametrize("name", ["sliding_window", "flash"])
def test_no_kind_gets_a_matrix_in_a_graph_of_one_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would make a window cost the square of the length."""
    model = swapped(build("llama", "causal", num_hidden_layers=1), name, **MATRIX[name].options)
    kind = type(MATRIX[name].kind)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    matrices, real = [], kind.attention

    @wraps(real)
    def noting(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any) -> Any:
        matrices.append(mask.dense)
        return real(self, query, key, value, mask, **options)

    monkeypatch.setattr(kind, "attention", noting)
    graph = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    assert matrices == [None] * len(matrices) != []
    torch.testing.assert_close(graph(ids, use_cache=False).logits, expected)
