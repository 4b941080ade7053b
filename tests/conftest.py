"""Settings for all tests: one thread (the machine is shared), no hub, quiet Transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from support.recipe_runs import checkpoint, tokenizer  # noqa: F401
from support.text_runs import byte_tokenizer, text, text_checkpoint  # noqa: F401

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
