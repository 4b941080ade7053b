"""What each process that runs tests needs: one thread (the machine is shared), quiet Transformers, and what is slow."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import collector, quick, slow
from support.recipe_runs import checkpoint, tokenizer  # noqa: F401
from support.text_runs import byte_tokenizer, text, text_checkpoint  # noqa: F401

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed_and_threads() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a command may have asked for more


def pytest_configure() -> None:
    torch.set_num_threads(1)
    slow.watch()
    quick.configure()
    collector.rarely()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow.mark(items)
    items.sort(key=lambda item: "test_wheel" not in item.nodeid)  # what takes longest starts first


def pytest_collection_finish() -> None:
    collector.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    with slow.running(item):
        result = yield
    if nextitem is None or nextitem.path != item.path:  # nothing of this file is asked for again
        collector.freeze()
    else:
        collector.freeze_now_and_then()
    return result
