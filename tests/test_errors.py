"""Bad input to conversion, pruning and selection: the exception names the value and the remedy, nothing changed.

For swaps see attention/test_swap_errors.py, for scores importance/test_importance_errors.py, for models that nothing
can be done with test_refused_models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.models import batch, build
from support.unchanged import unchanged

from hf_attnkit import convert_to_gqa, convert_to_mqa, prune_heads, select_heads

Bad = tuple[Callable[[Any], Any], type[Exception], str]

# 8 query over 4 key/value heads, layers 0 and 1.
MODEL: dict[str, Bad] = {
    "gqa: does not divide": (
        lambda m: convert_to_gqa(m, 3),
        ValueError,
        r"num_key_value_heads=3 is not possible.*8 query over 4 key/value.*possible: \[1, 2\]",
    ),
    "gqa: same": (lambda m: convert_to_gqa(m, 4), ValueError, r"num_key_value_heads=4.*be fewer.*possible: \[1, 2\]"),
    "gqa: more": (lambda m: convert_to_gqa(m, 8), ValueError, r"num_key_value_heads=8"),
    "gqa: zero": (lambda m: convert_to_gqa(m, 0), ValueError, "num_key_value_heads=0"),
    "gqa: negative": (lambda m: convert_to_gqa(m, -2), ValueError, "num_key_value_heads=-2"),
    "gqa: bool": (lambda m: convert_to_gqa(m, True), ValueError, "num_key_value_heads=True"),
    "gqa: float": (lambda m: convert_to_gqa(m, 2.0), ValueError, r"num_key_value_heads=2\.0"),
    "gqa: text": (lambda m: convert_to_gqa(m, "2"), ValueError, "num_key_value_heads='2'"),
    "gqa: method": (lambda m: convert_to_gqa(m, 2, method="median"), ValueError, "'median'; available: mean"),
    "gqa: calibration": (
        lambda m: convert_to_gqa(m, 2, calibration=[], refit=False),
        ValueError,
        "batches is empty",
    ),
    "gqa: empty calibration": (lambda m: convert_to_gqa(m, 2, calibration=[]), ValueError, "got none"),
    "gqa: refit": (lambda m: convert_to_gqa(m, 2, refit=True), ValueError, "refit=True needs calibration batches"),
    "gqa: key_method": (lambda m: convert_to_gqa(m, 2, key_method="pcs"), ValueError, "unknown key_method 'pcs'"),
    "gqa: grouping": (lambda m: convert_to_gqa(m, 2, grouping="near"), ValueError, "grouping='near' must be one of"),
    "gqa: random grouping": (
        lambda m: convert_to_gqa(m, 2, method="random", grouping="best"),
        ValueError,
        "does not aim at one",
    ),
    "gqa: budget and number": (lambda m: convert_to_gqa(m, 2, budget=0.5), ValueError, "or budget, not both"),
    "gqa: budget": (lambda m: convert_to_gqa(m, budget=1.5), ValueError, "budget=1.5 must be a number between 0 and 1"),
    "gqa: small budget": (lambda m: convert_to_gqa(m, budget=0.01), ValueError, "less than one for each of 2 layers"),
    "gqa: uniform": (lambda m: convert_to_gqa(m, 2, uniform=False), ValueError, "give budget, or a list"),
    "gqa: list": (lambda m: convert_to_gqa(m, [2]), ValueError, "lists 1 numbers, the model has 2 layers"),
    "gqa: list's number": (lambda m: convert_to_gqa(m, [2, 3]), ValueError, r"num_key_value_heads\[1\]=3"),
    "gqa: list of the present": (lambda m: convert_to_gqa(m, [4, 4]), ValueError, "nothing would change"),
    "gqa: few tokens": (
        lambda m: convert_to_gqa(m, 1, method="pca", calibration=[batch(m)]),
        ValueError,
        "30 calibration tokens are too few",
    ),
    "mqa: calibration": (
        lambda m: convert_to_mqa(m, calibration=[batch(m)], refit=False),
        ValueError,
        "30 calibration tokens are too few",
    ),
    "prune: layer 2": (lambda m: prune_heads(m, {2: [0]}), ValueError, "layer 2 .*layers 0 to 1"),
    "prune: layer -1": (lambda m: prune_heads(m, {-1: [0]}), ValueError, "layer -1 .*layers 0 to 1"),
    "prune: layer bool": (lambda m: prune_heads(m, {True: [0, 1]}), ValueError, "layer True"),
    "prune: head 8": (lambda m: prune_heads(m, {0: [0, 8]}), ValueError, "layer 0 .*: head 8 .*heads 0 to 7"),
    "prune: head -1": (lambda m: prune_heads(m, {0: [-1]}), ValueError, "layer 0 .*: head -1 .*heads 0 to 7"),
    "prune: head bool": (lambda m: prune_heads(m, {0: [False, 1]}), ValueError, "head False"),
    "prune: twice": (lambda m: prune_heads(m, {0: [0, 1, 1]}), ValueError, r"a head is named twice in \[0, 1, 1\]"),
    "prune: none": (lambda m: prune_heads(m, {0: [], 1: []}), ValueError, "no head to remove"),
    "prune: empty": (lambda m: prune_heads(m, {}), ValueError, "no head to remove"),
    "prune: no mapping": (lambda m: prune_heads(m, [0, 1]), (TypeError, ValueError), r"\[0, 1\]"),
    "prune: heads a number": (lambda m: prune_heads(m, {0: 1}), (TypeError, ValueError), "layer 0"),
    "prune: unequal groups": (
        lambda m: prune_heads(m, {0: [0]}),
        ValueError,
        r"layer 0 .*: 8 query heads share 4 key/value heads.*groups of \[1, 2, 2, 2\]; "
        "remove whole groups, or the same number",
    ),
    "prune: second layer bad": (lambda m: prune_heads(m, {0: [0, 1], 1: [2]}), ValueError, "layer 1 .*: .*groups of"),
    "prune: refit": (
        lambda m: prune_heads(m, {0: [0, 1]}, calibration=[batch(m)], refit="all"),
        ValueError,
        "refit='all' must be one of 'none', 'output'",
    ),
    "prune: refit without data": (
        lambda m: prune_heads(m, {0: [0, 1]}, refit="scale"),
        ValueError,
        "refit='scale' needs calibration batches",
    ),
    "prune: calibration": (
        lambda m: prune_heads(m, {0: [0, 1]}, calibration=[]),
        ValueError,
        "refit needs calibration batches",
    ),
}

SCORES = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
SELECT: dict[str, Bad] = {
    "one dimension": (lambda s: select_heads(s[0], fraction=0.5), ValueError, r"shape \(4,\); it must be"),
    "a list": (lambda s: select_heads(s.tolist(), fraction=0.5), (TypeError, ValueError), "importance"),
    "neither": (select_heads, ValueError, "exactly one of fraction and num_heads"),
    "both": (lambda s: select_heads(s, fraction=0.5, num_heads=1), ValueError, "exactly one of"),
    "fraction 1": (lambda s: select_heads(s, fraction=1.0), ValueError, r"fraction=1\.0 must be .*below 1"),
    "fraction -0.1": (lambda s: select_heads(s, fraction=-0.1), ValueError, r"fraction=-0\.1"),
    "fraction nan": (lambda s: select_heads(s, fraction=float("nan")), ValueError, "fraction=nan"),
    "fraction 50": (lambda s: select_heads(s, fraction=50), ValueError, "fraction=50 .*share"),
    "number -1": (lambda s: select_heads(s, num_heads=-1), ValueError, "num_heads=-1 .*at least 0"),
    "number 1.5": (lambda s: select_heads(s, num_heads=1.5), ValueError, r"num_heads=1\.5 must be an integer"),
    "number bool": (lambda s: select_heads(s, num_heads=True), ValueError, "num_heads=True"),
    "too many": (
        lambda s: select_heads(s, num_heads=7),
        ValueError,
        "7 heads cannot be removed.* 6 can; ask for fewer",
    ),
    "too many in a layer": (
        lambda s: select_heads(s, num_heads=4, per_layer=True),
        ValueError,
        "4 heads cannot be removed from layer 0.* 3 can",
    ),
    "min_heads stands in the way": (
        lambda s: select_heads(s, fraction=0.5, min_heads=3),
        ValueError,
        "4 heads .*at least 3 kept .* 2 can",
    ),
    "min_heads -1": (lambda s: select_heads(s, num_heads=1, min_heads=-1), ValueError, "min_heads=-1 .*at least 0"),
    "more than all": (lambda s: select_heads(s, num_heads=9, min_heads=0), ValueError, "9 heads .* 8 can"),
    "unknown groups": (
        lambda s: select_heads(s, num_heads=2, num_key_value_heads=2, groups="within"),
        ValueError,
        "groups='within' must be one of 'whole', 'across'",
    ),
    "across no groups": (
        lambda s: select_heads(s, num_heads=2, groups="across"),
        ValueError,
        "groups='across' .*give num_key_value_heads",
    ),
    "less than one from each": (
        lambda s: select_heads(s, num_heads=3, num_key_value_heads=2, groups="across"),
        ValueError,
        "3 heads cannot be removed.*equally many from each group.* 2 can",
    ),
    "groups bool": (
        lambda s: select_heads(s, num_heads=2, num_key_value_heads=[True, 2]),
        ValueError,
        "=True must be an integer",
    ),
    "min_heads bool": (lambda s: select_heads(s, num_heads=1, min_heads=True), ValueError, "min_heads=True"),
    "groups": (
        lambda s: select_heads(s, num_heads=1, num_key_value_heads=3),
        ValueError,
        "4 heads do not divide into num_key_value_heads=3",
    ),
    "groups 0": (lambda s: select_heads(s, num_heads=1, num_key_value_heads=0), ValueError, "num_key_value_heads=0"),
    "groups of other layers": (
        lambda s: select_heads(s, num_heads=1, num_key_value_heads=[2]),
        ValueError,
        "1 entries for 2 layers",
    ),
    "less than a group": (
        lambda s: select_heads(s, num_heads=1, num_key_value_heads=2),
        ValueError,
        "1 heads cannot be removed.*whole groups.* 0 can",
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "causal", 8, 4)


@pytest.mark.parametrize(("call", "error", "message"), MODEL.values(), ids=MODEL)
def test_bad_argument(model: Any, call: Callable, error: type[Exception], message: str) -> None:
    with unchanged(model), pytest.raises(error, match=f"(?s){message}"):
        call(model)


@pytest.mark.parametrize(("call", "error", "message"), SELECT.values(), ids=SELECT)
def test_bad_selection(call: Callable, error: type[Exception], message: str) -> None:
    before = SCORES.clone()
    with pytest.raises(error, match=message):
        call(SCORES)
    assert torch.equal(SCORES, before)


def test_numbers_of_other_libraries_are_no_riddle() -> None:
    """Indices from NumPy or torch either work or are refused for what they are, not as out of range."""
    for index in (np.int64(1), torch.tensor(1)):
        try:
            pruned = prune_heads(build("bert"), {0: [index]})
        except (TypeError, ValueError) as error:
            assert "out of range" not in str(error)
        else:
            assert pruned.encoder.layer[0].attention.self.query.out_features == 56
