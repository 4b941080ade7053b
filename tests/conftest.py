"""Settings for all tests: one thread (the machine is shared), no hub, quiet Transformers; and what `slow` means."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy and scikit-learn too

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
