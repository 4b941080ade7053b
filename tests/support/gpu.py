"""Where the tests of tests/gpu run: on a CUDA GPU, else they are skipped.

`HF_ATTNKIT_GPU_TESTS_ON=cpu` rehearses them without one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("HF_ATTNKIT_GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA GPU")


def there(value: Any) -> Any:
    """A copy on the GPU: of a model, a tensor, a batch or a list of them."""
    if isinstance(value, Mapping):
        return {name: there(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(there(each) for each in value)
    return copy.deepcopy(value).to(DEVICE) if hasattr(value, "to") else value


def back(value: Tensor | Mapping[str, Tensor]) -> Any:
    """On the CPU again."""
    return {name: each.cpu() for name, each in value.items()} if isinstance(value, Mapping) else value.detach().cpu()


@contextmanager
def tf32(how: str) -> Iterator[None]:
    """TF32 allowed within the block, as users allow it: by "switch", by "name", or not at all ("off")."""
    before = torch.get_float32_matmul_precision()
    try:
        if how == "switch":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif how == "name":
            torch.set_float32_matmul_precision("high")
        yield
        assert torch.backends.cuda.matmul.allow_tf32 is (how != "off")  # nothing that ran inside has changed it
    finally:
        torch.set_float32_matmul_precision(before)
