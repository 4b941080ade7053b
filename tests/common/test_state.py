"""What a change runs in is as it was before, whatever the process had set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_attnkit.common.state import full_precision, plain_mode

MATMUL, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def legacy() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch refuses to read it where the newer settings say otherwise
        return None


def read() -> tuple[Any, ...]:
    return (
        legacy(),
        MATMUL.fp32_precision,
        CPU.fp32_precision,
        MATMUL.allow_fp16_reduced_precision_reduction,
        MATMUL.allow_bf16_reduced_precision_reduction,
        MATMUL.allow_fp16_accumulation,
    )


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = read()
    yield
    torch.set_float32_matmul_precision(before[0])
    MATMUL.fp32_precision, CPU.fp32_precision = before[1], before[2]
    MATMUL.allow_fp16_reduced_precision_reduction = before[3]
    MATMUL.allow_bf16_reduced_precision_reduction = before[4]
    MATMUL.allow_fp16_accumulation = before[5]


def by_switch() -> None:
    MATMUL.allow_tf32 = True


def nothing() -> None:
    pass


def by_name() -> None:
    torch.set_float32_matmul_precision("medium")


def by_backend() -> None:
    MATMUL.fp32_precision = "tf32"


def sums() -> None:
    MATMUL.allow_bf16_reduced_precision_reduction = False
    MATMUL.allow_fp16_accumulation = True


@pytest.mark.parametrize("context", [full_precision, plain_mode])
@pytest.mark.parametrize("allow", [nothing, by_switch, by_name, by_backend, sums])
def test_products_are_as_precise_as_their_dtype(allow: Callable[[], None], context: Callable) -> None:
    allow()
    before = read()
    with pytest.raises(KeyError), context():
        assert read()[0] in ("highest", None) and set(read()[1:3]) <= {"ieee", "none"}
        assert read()[3:] == (False, False, False)
        raise KeyError("the settings come back after an error too")
    assert read() == before


def test_the_settings_that_pytorch_reads_do_not_contradict_each_other() -> None:
    """It refuses to read TF32's old switch where the new one says otherwise, and torch.compile reads the old one."""
    MATMUL.allow_tf32 = True
    with full_precision():
        assert MATMUL.allow_tf32 is False
    assert MATMUL.allow_tf32 is True
