"""What a kind says that it sees, which the other tests take for its definition, against patterns written by hand."""

from __future__ import annotations

import pytest
import torch
from support.matrix import COVERED, MATRIX, open_rows, text, visible

from hf_attnkit import available_attentions
from hf_attnkit.attention.mask import Mask

PATTERNS = [name for name, case in MATRIX.items() if case.pattern is not None]


def test_every_kind_is_in_the_matrix() -> None:
    assert available_attentions() == COVERED


def test_every_kind_that_hides_keys_has_a_pattern_written_by_hand() -> None:
    hiding = [name for name, case in MATRIX.items() if case.kind.forms_scores and not case.exact]
    assert hiding == PATTERNS


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "a row of padding"])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (30, 30), (1, 30), (7, 30)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_seen_against_the_pattern(name: str, lengths: tuple[int, int], padding: str, is_causal: bool) -> None:
    queries, keys = lengths
    real = torch.ones(3, keys, dtype=torch.bool)
    hidden = {"left": slice(0, keys // 3), "right": slice(keys - keys // 3, None), "a row of padding": slice(None)}
    if padding != "none":
        real[1, hidden[padding]] = False
    mask = Mask.aligned(queries, keys, is_causal=is_causal, key_visible=None if padding == "none" else real)
    where = text(mask)
    patterns = MATRIX[name].patterns
    expected = torch.stack(
        [pattern(where) & real[:, None] & ((where.j <= where.i) | (not is_causal)) for pattern in patterns], dim=1
    )
    rows = open_rows(name, mask)
    unsaid = torch.zeros(1, 1, 1, 1, dtype=torch.bool) if rows is None else rows
    found = visible(name, mask, 2 * len(patterns), len(patterns))
    found = found[:, ::2] if len(patterns) > 1 else found
    assert torch.equal((found & ~unsaid).expand(3, -1, -1, -1), (expected & ~unsaid).expand(3, -1, -1, -1))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", PATTERNS)
def test_seen_of_a_full_matrix(name: str, is_causal: bool) -> None:
    """The same pattern, and what the matrix hides besides."""
    matrix = torch.rand(2, 1, 30, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    matrix |= torch.eye(30, dtype=torch.bool)  # every token is seen by itself, so that the first one is the first
    matrix &= torch.ones(30, 30, dtype=torch.bool).tril() | (not is_causal)
    whole = Mask.aligned(30, 30, is_causal=is_causal)
    given = Mask.receive(matrix, 30, 30, is_causal=is_causal, device=matrix.device)
    found, all_of_it = (visible(name, mask, 4, 2) for mask in (given, whole))
    assert torch.equal(found.expand(2, -1, -1, -1), all_of_it & matrix)
