"""Bad input to `head_importance`: the exception names the value and the remedy, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import batch, build
from support.unchanged import unchanged

from hf_attnkit import attention_entropy, head_importance

Bad = tuple[Callable[[Any], Any], type[Exception], str]

# 8 query over 4 key/value heads, layers 0 and 1.
MODEL: dict[str, Bad] = {
    "importance: method": (
        lambda m: head_importance(m, [], method="tailor"),
        ValueError,
        "'tailor'; available: entropy, .*, taylor, .*, magnitude, random",
    ),
    "importance: option": (
        lambda m: head_importance(m, [], method="entropy", seed=1),
        ValueError,
        "no option seed; it takes direction, normalize",
    ),
    "importance: option of none": (
        lambda m: head_importance(m, method="magnitude", norm=1),
        ValueError,
        "no option norm; it takes no options",
    ),
    "importance: no batches": (head_importance, ValueError, "give batches of model inputs"),
    "importance: empty batches": (
        lambda m: head_importance(m, []),
        ValueError,
        r"batches is empty; .*\(an iterator is spent",
    ),
    "importance: ids without tensors": (
        lambda m: head_importance(m, [{"input_ids": [[1, 2, 3]]}]),
        ValueError,
        r"input_ids is a list; it must be a tensor .*return_tensors='pt'",
    ),
    "importance: one row without its axis": (
        lambda m: head_importance(m, [{"input_ids": torch.tensor([1, 2, 3])}]),
        ValueError,
        r"input_ids is of shape \(3,\); it must be a tensor \(batch, tokens\)",
    ),
    "importance: a batch of nothing": (
        lambda m: head_importance(m, [{"input_ids": torch.zeros(2, 0, dtype=torch.long)}]),
        ValueError,
        r"input_ids is of shape \(2, 0\); .* not empty",
    ),
    "importance: tensor": (
        lambda m: head_importance(m, [torch.ones(1, 3)]),
        ValueError,
        "must be a mapping .*got Tensor",
    ),
    "importance: batches a mapping": (
        lambda m: head_importance(m, batch(m)),
        ValueError,
        "must be a mapping .*got str",
    ),
    "importance: second batch bad": (
        lambda m: head_importance(m, [batch(m), (1, 2)]),
        ValueError,
        "must be a mapping .*got tuple",
    ),
    "importance: direction": (
        lambda m: head_importance(m, [batch(m)], method="entropy", direction="sharp"),
        ValueError,
        "direction='sharp' .*'focused', 'diffuse'",
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "causal", 8, 4)


@pytest.mark.parametrize(("call", "error", "message"), MODEL.values(), ids=MODEL)
def test_bad_argument(model: Any, call: Callable, error: type[Exception], message: str) -> None:
    with unchanged(model), pytest.raises(error, match=f"(?s){message}"):
        call(model)


def test_entropy_of_tensors_that_do_not_fit() -> None:
    query, key = torch.ones(1, 6, 3, 4), torch.ones(1, 4, 5, 4)
    with pytest.raises(ValueError, match="6 query heads do not divide into 4"):
        attention_entropy(query, key)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); it must be \(batch, key_length\) = \(1, 5\)"):
        attention_entropy(query, key[:, :3], attention_mask=torch.ones(1, 3))
