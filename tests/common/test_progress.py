"""The progress bar: quiet where Transformers' bars are, and on every process but the main one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from transformers.utils import logging

from hf_attnkit.common.progress import progress_bar


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def use() -> None:
    assert list(progress_bar([1, 2], description="items", unit="item")) == [1, 2]
    with progress_bar(description="bytes", unit="B", total=7, unit_scale=True) as bar:
        bar.update(7)


def test_shown(capsys: pytest.CaptureFixture[str]) -> None:
    use()
    shown = capsys.readouterr().err
    assert "items: 100%" in shown and "2/2" in shown
    assert "bytes: 100%" in shown and "7.00/7.00" in shown


def test_disabled_with_those_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    logging.disable_progress_bar()
    use()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "is_shown"), [(0, True), (1, False)])
def test_main_process_only(
    rank: int, is_shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    use()
    assert bool(capsys.readouterr().err) is is_shown
