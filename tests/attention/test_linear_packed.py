"""Packed rows under linear attention: its state starts again with each document, in memory linear in the length.

`test_packing.py` has whole models; here are the sums, against the definition in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_exact64
from support.linear import SCALING, both_ways, compare, inputs, learned_for, parameters, run
from support.models import build
from support.swapping import swapped
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hf_attnkit.attention.create_mask import create_mask
from hf_attnkit.attention.kind import Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask

pytestmark = pytest.mark.usefixtures("small_segments")
LENGTHS = ((9, 13, 1, 38), (4, 56, 1))  # chunks are 7 tokens here, segments 24
DECAYED = {"feature_map": "hedgehog", "window": 4, "decay": "learned", "gate": "learned"}
TAYLOR = DECAYED | {"feature_map": "taylor_exponential"}
EVERY = [{"feature_map": "elu"}, {"feature_map": "elu", "decay": "learned"}, DECAYED, {"feature_map": "taylor"}, TAYLOR]
every = pytest.mark.parametrize("options", EVERY, ids=["elu", "decay", "decay and window", "taylor", "taylor and all"])


def packed() -> Tensor:
    """Numbers of the documents, `(2, 61)`; two that are the same number are not next to each other."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])


def mask(is_causal: bool = True) -> Mask:
    positions = torch.arange(61)[None]
    return Mask(positions, positions, is_causal, known_offset=0, document=packed())


@both_ways
@every
def test_each_document_by_definition(options: dict[str, Any], is_causal: bool) -> None:
    compare(options, mask(is_causal), [*inputs(4, 2, 61, 61), *learned_for(options, 4, 2)])


@every
def test_each_document_as_if_alone(options: dict[str, Any]) -> None:
    query, key, value, *learned = [*inputs(4, 2, 61, 61), *learned_for(options, 4, 2)]
    whole = run(options, mask(), query, key, value, *learned)
    call = Call(parameters=parameters(options, query, key, *learned))
    kind = LinearAttention(**options)
    assert_exact64(kind.of_any_length(query, key, value, mask(), scaling=SCALING, call=call), whole, terms=122)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            own = (x[row : row + 1, :, start : start + length] for x in (query, key, value))
            alone = run(options, Mask.aligned(length, length, is_causal=True), *own, *learned)
            assert_exact64(whole[row : row + 1, :, start : start + length], alone, terms=122)
            start += length


def model(**layers: Any) -> Any:
    return swapped(build("llama", "causal").double(), "linear", window=3, **layers)


def arguments(function: Any) -> dict[str, Any]:
    return {"batch_size": 2, "q_length": 61, "kv_length": 61, "mask_function": function}


def test_the_mask_is_two_rows_of_numbers() -> None:
    function = and_masks(causal_mask_function, packed_sequence_mask_function(packed()))
    made = create_mask(**arguments(function), config=model().config)
    assert made.shape == (2, 1, 2, 122)
    received = Mask.receive(made, 61, 61, is_causal=True, device=made.device)
    matrix = sdpa_mask(**arguments(function), allow_is_causal_skip=False)
    assert received.dense is None and torch.equal(received.document, packed()) and not received.is_trivial
    assert torch.equal(received.visible(), matrix)
    assert torch.equal(received.visible(slice(20, 30), slice(10, 40)), matrix[..., 20:30, 10:40])
    whole = received.as_matrix()
    assert torch.equal(whole.dense, matrix) and whole.document is None
    assert torch.equal(
        whole.first_tokens(), Mask.receive(matrix, 61, 61, is_causal=True, device=made.device).first_tokens()
    )


@pytest.mark.parametrize("what", ["no such kind", "a window too", "a function of the user's"])
def test_anything_else_stays_a_matrix(what: str) -> None:
    causal = sliding_window_causal_mask_function(3) if what == "a window too" else causal_mask_function
    apart = packed_sequence_mask_function(packed())
    user = (lambda b, h, q, k: q // 4 == k // 4) if what == "a function of the user's" else apart
    function = and_masks(causal, user)
    config = build("llama", "causal").config if what == "no such kind" else model().config
    made = create_mask(**arguments(function), config=config)
    assert torch.equal(made, sdpa_mask(**arguments(function), allow_is_causal_skip=False))


def test_documents_with_a_cache_or_of_another_pass_refused() -> None:
    function = and_masks(causal_mask_function, packed_sequence_mask_function(packed()))
    made = create_mask(**arguments(function), config=model().config)
    for queries, cache in ((61, LinearAttention().create_cache(None)), (60, None)):
        with pytest.raises(ValueError, match=r"packed rows of 61 tokens, .*one pass without a cache: use_cache=False"):
            Mask.receive(made, queries, queries, is_causal=True, device=made.device, cache=cache)


@torch.no_grad()
def test_next_to_layers_with_softmax() -> None:
    """Those take the documents as a matrix; all layers get one mask."""
    for mixed in (model(layers=[0]), swapped(model(), "sliding_window", window=5, layers=[1])):
        ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(0))
        position = torch.cat([torch.arange(7), torch.arange(13)])[None]
        found = mixed(ids, position_ids=position).logits
        for part in (slice(0, 7), slice(7, 20)):
            alone = mixed(ids[:, part], use_cache=False).logits
            torch.testing.assert_close(found[:, part], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_graph_of_one_text_has_no_matrix() -> None:
    """Without a mask and a cache Transformers makes a matrix there, whatever the positions are."""
    one = swapped(build("llama", "causal", num_hidden_layers=1), "linear")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = one(ids, use_cache=False).logits
    exported = torch.export.export(one, (ids,), {"use_cache": False}, strict=False).module()
    torch.testing.assert_close(exported(ids, use_cache=False).logits, expected)
    given = {"use_cache": False, "position_ids": torch.arange(9)[None]}
    with pytest.raises(ValueError, match=r"whose values a graph cannot look at: leave position_ids out"):
        torch.export.export(one, (ids,), given, strict=False)
