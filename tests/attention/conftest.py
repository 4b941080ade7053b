"""What the tests of attention share."""

from __future__ import annotations

import pytest

from hf_attnkit.attention.kernels import linear_sums


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments and chunks of linear attention in a short text; the sizes divide nothing."""
    monkeypatch.setattr(linear_sums, "SEGMENT", 24)
    monkeypatch.setattr(linear_sums, "CHUNK", 7)
