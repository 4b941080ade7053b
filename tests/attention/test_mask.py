"""`create_mask` and `Mask.receive` keep exactly what Transformers' own dense mask says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import batch, build
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_attnkit import head_importance
from hf_attnkit.attention.create_mask import create_mask
from hf_attnkit.attention.mask import Mask

CPU = torch.device("cpu")


def ours(q_length: int, kv_length: int, is_causal: bool, **arguments: Any) -> Mask:
    tensor = create_mask(q_length=q_length, kv_length=kv_length, **arguments)
    return Mask.receive(tensor, q_length, kv_length, is_causal=is_causal, device=CPU)


def dense(mask: Mask, like: Tensor) -> Tensor:
    visible = mask.visible()
    return torch.ones_like(like) if visible is None else visible.expand_as(like)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 12),
    offset=st.integers(0, 12),
    spare=st.integers(0, 6),
    hidden=st.integers(0, 12),
    left=st.booleans(),
    is_causal=st.booleans(),
    padded=st.booleans(),
    static=st.booleans(),
)
def test_causal_and_bidirectional(
    queries: int, offset: int, spare: int, hidden: int, left: bool, is_causal: bool, padded: bool, static: bool
) -> None:
    """Caches (an offset, and with StaticCache empty slots and a tensor as the offset) and padding."""
    keys = offset + queries
    attention_mask = torch.ones(2, keys, dtype=torch.bool)
    attention_mask[1, slice(0, min(hidden, keys)) if left else slice(keys - min(hidden, keys), None)] = False
    arguments = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys + (spare if static else 0),
        "q_offset": torch.tensor(offset) if static else offset,
        "mask_function": causal_mask_function if is_causal else bidirectional_mask_function,
        "attention_mask": attention_mask if padded else None,
    }
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    if not is_causal and static and not padded:
        return  # nothing tells an empty slot from a key here, in Transformers neither
    mask = ours(is_causal=is_causal, **arguments)
    assert torch.equal(dense(mask, expected), expected)
    # The single query of a decode step may lose its "causal", never its keys.
    assert mask.dense is None and mask.bias is None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("q_length", "offset"), [(9, 0), (3, 6), (1, 8), (3, 2)])
def test_window_of_the_model_stays_positions(q_length: int, offset: int, padded: bool) -> None:
    attention_mask = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        attention_mask[1, :4] = False
    arguments = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": 9,
        "q_offset": offset,
        "mask_function": sliding_window_causal_mask_function(3),
        "attention_mask": attention_mask,
    }
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    made = create_mask(**arguments)
    mask = Mask.receive(made, q_length, 9, is_causal=True, device=CPU, window=3)
    assert torch.equal(mask.visible(), expected)
    assert mask.dense is None and mask.window == 3 and not mask.is_trivial
    assert torch.equal(mask.as_matrix().dense, expected) and mask.as_matrix().window is None
    unsaid = Mask.receive(made, q_length, 9, is_causal=True, device=CPU)  # a layer that passes no sliding_window
    assert unsaid.window == 3 and torch.equal(unsaid.visible(), expected)


OTHERS = {
    "packed": and_masks(causal_mask_function, lambda b, h, q, k: q // 4 == k // 4),
    "packed window": and_masks(sliding_window_causal_mask_function(3), lambda b, h, q, k: q // 4 == k // 4),
    "two-sided window": sliding_window_bidirectional_mask_function(3),
    "other order": and_masks(causal_mask_function, sliding_window_causal_mask_function(3)),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_other_functions_become_a_matrix(function: Any) -> None:
    attention_mask = torch.ones(2, 9, dtype=torch.bool)
    attention_mask[1, :4] = False
    arguments = {
        "batch_size": 2,
        "q_length": 9,
        "kv_length": 9,
        "mask_function": function,
        "attention_mask": attention_mask,
    }
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(ours(is_causal=True, **arguments).visible(), expected)


def test_memory_is_linear() -> None:
    attention_mask = torch.ones(1, 1000, dtype=torch.bool)
    attention_mask[0, 0] = False
    tensor = create_mask(batch_size=1, q_length=1000, kv_length=1000, attention_mask=attention_mask)
    assert tensor.numel() == 2000
    assert create_mask(batch_size=1, q_length=1000, kv_length=1000) is None


def test_no_mask_means_queries_at_the_end() -> None:
    mask = Mask.receive(None, 3, 5, is_causal=True, device=CPU)
    assert mask.visible()[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert Mask.receive(None, 1, 5, is_causal=True, device=CPU).visible() is None


def test_queries_of_a_static_cache_are_found_in_a_matrix() -> None:
    """With empty slots behind the queries, their positions follow from the matrix: windows need them."""
    matrix = sdpa_mask(batch_size=1, q_length=2, kv_length=8, q_offset=3, allow_is_causal_skip=False)
    mask = Mask.receive(matrix, 2, 8, is_causal=True, device=CPU)
    assert mask.query_position.tolist() == [[3, 4]]


@pytest.mark.parametrize("shape", [(1, 1, 4, 3), (1, 1, 3, 4)], ids=["too few keys", "too few queries"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_matrix_of_another_size_is_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"the attention mask has shape .* but the layer has 4 queries and 4 keys"):
        Mask.receive(torch.ones(shape, dtype=dtype), 4, 4, is_causal=False, device=CPU)


def test_a_layer_that_keeps_fewer_keys_holds_the_last_ones() -> None:
    attention_mask = torch.tensor([[0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    tensor = create_mask(batch_size=1, q_length=2, kv_length=6, q_offset=4, attention_mask=attention_mask)
    mask = Mask.receive(tensor, 2, 4, is_causal=True, device=CPU)
    assert mask.key_position.tolist() == [[2, 3, 4, 5]] and mask.query_position.tolist() == [[4, 5]]
    assert mask.visible()[0, 0].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert mask.offset() == 2


def test_positions_of_another_pass_are_refused() -> None:
    tensor = create_mask(batch_size=1, q_length=2, kv_length=4, q_offset=torch.tensor(2))
    with pytest.raises(ValueError, match="describes 4 keys, but the layer has 6"):
        Mask.receive(tensor, 2, 6, is_causal=True, device=CPU)


@pytest.mark.parametrize("number", [-1e4, -1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_hide(number: float, dtype: torch.dtype) -> None:
    """Of MarkupLM, and of users' own matrices; a row without another key keeps its weights, as Transformers has it."""
    shown = torch.ones(4, 4, dtype=torch.bool).tril()
    shown[:, 0] = False
    matrix = torch.full((1, 1, 4, 4), number, dtype=dtype).masked_fill(shown, 0.0)
    mask = Mask.receive(matrix, 4, 4, is_causal=True, device=CPU)
    visible = mask.visible()
    assert visible is not None and torch.equal(visible[0, 0, 1:], shown[1:])
    scores = torch.randn(1, 2, 4, 4)
    want = (scores + matrix.float()).softmax(-1)
    rows = slice(1, None) if number < -1e8 else slice(None)  # larger numbers leave nothing of a score next to them
    torch.testing.assert_close(mask.softmax(scores)[:, :, rows], want[:, :, rows], rtol=1e-3, atol=1e-6)


def test_entropy_under_a_matrix_of_numbers() -> None:
    """Padding of a mask of -10,000 counts no more than under the mask that says it in words."""
    model = build("bert")
    inputs = batch(model)
    matrix = (1 - inputs["attention_mask"][:, None, None].float()) * -10_000
    for method in ("entropy", "confidence"):
        scores = [head_importance(model, [inputs | {"attention_mask": mask}], method=method)
                  for mask in (matrix, inputs["attention_mask"])]  # fmt: skip
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)
