"""Each backend on a GPU: as accurate as plain attention in the same dtype, forward and backward, in linear memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate, gradients
from support.gpu import DEVICE, ON_GPU, needs_gpu
from support.reference import Text, attend, window
from torch import Tensor

from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.benchmarking.measure import peak_bytes

pytestmark = [needs_gpu, pytest.mark.slow]  # the compiled ones start processes

LENGTH = 300  # no multiple of FlexAttention's blocks
# queries, causal, padded, window
CASES: dict[str, tuple[int, bool, bool, int | None]] = {
    "causal": (LENGTH, True, False, None),
    "causal padded": (LENGTH, True, True, None),
    "padded": (LENGTH, False, True, None),
    "window": (LENGTH, True, True, 40),
    "window both ways": (LENGTH, False, True, 40),
    "some queries": (70, True, False, None),
    "one query": (1, True, True, None),
    "one query, window": (1, True, True, 40),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(queries: int, keys: int, dtype: torch.dtype, heads: int = 4, size: int = 64) -> list[Tensor]:
    """Four query heads over two key/value heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, queries, size), (2, heads // 2, keys, size), (2, heads // 2, keys, size))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def make_mask(queries: int, keys: int, is_causal: bool, padded: bool) -> Mask:
    """Two thirds of the second row are text, on the right."""
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[1, : keys // 3] = False
    visible = seen.to(DEVICE) if padded else None
    return Mask.aligned(queries, keys, is_causal=is_causal, key_visible=visible, device=torch.device(DEVICE))


def allowed(mask: Mask, size: int | None) -> Tensor:
    """`(B, 1, Q, K)` from the definition."""
    i, j = mask.query_position[:, :, None], mask.key_position[:, None, :]
    seen = (j <= i) if mask.is_causal else (j == j) & (i == i)
    seen = seen & mask.key_visible[:, None] if mask.key_visible is not None else seen
    return (seen if size is None else seen & window(size, Text(i, j, i, j, mask.is_causal)))[:, None]


def compare(attention: Callable[..., Tensor], seen: Tensor, tensors: list[Tensor], backward: bool = True) -> None:
    """With the plain product in the same dtype, and with the definition in float64."""

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, seen, scaling=0.2)

    if backward:
        runs = [gradients(attention, *tensors), gradients(plain, *tensors)]
        runs.append(gradients(plain, *(x.double() for x in tensors)))
    else:
        with torch.no_grad():
            runs = [(attention(*tensors),), (plain(*tensors),), (plain(*(x.double() for x in tensors)),)]
    for ours, stock, exact in zip(*runs, strict=True):
        assert ours.device.type == torch.device(DEVICE).type
        assert_as_accurate(ours, stock, exact, terms=LENGTH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["tiled", "packed", "sdpa", "flex", "flash_attn", "auto"])
def test_equal_to_the_definition(backend: str, case: str, dtype: torch.dtype) -> None:
    queries, is_causal, padded, size = CASES[case]
    if backend == "flex" and dtype == torch.float16:
        pytest.skip("compiled for the two other dtypes")
    tensors, mask = inputs(queries, LENGTH, dtype), make_mask(queries, LENGTH, is_causal, padded)
    backward = queries > 1 and not (backend == "flex" and not ON_GPU)
    if backend != "auto" and (reason := backends.refusal(backend, *tensors[:2], mask, window=size)):
        pytest.skip(f"{backend} {reason}")

    def ours(*given: Tensor) -> Tensor:
        return backends.attend(*given, mask, scaling=0.2, window=size, backend=backend)

    compare(ours, allowed(mask, size), tensors, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["tiled", "sdpa", "auto"])
def test_bias_and_rows_that_see_nothing(backend: str, dtype: torch.dtype) -> None:
    """The bias gets its gradient, and a query that sees no key gives zeros."""
    tensors, mask = inputs(70, 70, dtype), make_mask(70, 70, True, True)
    bias = torch.randn(1, 4, 70, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    seen = allowed(mask, None)

    def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        biased = Mask(mask.query_position, mask.key_position, True, key_visible=mask.key_visible, bias=bias)
        return backends.attend(query, key, value, biased, scaling=0.2, backend=backend)

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend(query, key, value, seen, scaling=0.2, bias=bias)

    got, stock = gradients(ours, *tensors, bias), gradients(plain, *tensors, bias)
    exact = gradients(plain, *(x.double() for x in (*tensors, bias)))
    for each in zip(got, stock, exact, strict=True):
        assert_as_accurate(*each, terms=70)
    assert not got[0][1, :, :20].any()


@pytest.mark.parametrize("size", [None, 40])
def test_flex_at_one_length_after_the_other(size: int | None) -> None:
    """What was compiled for one length must not serve another."""
    for length in (131, 300, 640, 257):
        tensors, mask = inputs(length, length, torch.bfloat16), make_mask(length, length, True, True)

        def ours(*given: Tensor, mask: Mask = mask) -> Tensor:
            return backends.attend(*given, mask, scaling=0.2, window=size, backend="flex")

        compare(ours, allowed(mask, size), tensors, backward=ON_GPU)


@pytest.mark.parametrize("size", [None, 60])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_what_auto_takes_for_long_sequences(padded: bool, size: int | None) -> None:
    """Past the lengths for which a matrix is formed."""
    length = (backends.SHORT_ON_GPU if ON_GPU else 1024) + 70
    tensors, mask = inputs(length, length, torch.bfloat16, heads=2), make_mask(length, length, True, padded)
    if ON_GPU:
        assert backends.choose(*tensors[:2], mask, window=size)[0] in ("sdpa", "flex", "flash_attn")

    def ours(*given: Tensor) -> Tensor:
        return backends.attend(*given, mask, scaling=0.2, window=size)

    compare(ours, allowed(mask, size), tensors)


MEMORY: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash padded": {"padded": True},
    "flash tiled": {"backend": "tiled"},
    "sliding_window": {"window": 256},
    "sliding_window tiled": {"window": 256, "backend": "tiled"},
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_linear(name: str) -> None:
    """Twice the tokens, at most twice the memory; 5% is for how allocators round. A matrix would be four times."""
    options = dict(MEMORY[name])
    padded, unit = options.pop("padded", False), 8192 if ON_GPU else 1024

    def peak(length: int) -> int:
        tensors, mask = inputs(length, length, torch.bfloat16, heads=4), make_mask(length, length, True, padded)
        leaves = [x.requires_grad_() for x in tensors]

        def step() -> None:
            output = backends.attend(*leaves, mask, scaling=0.2, **options)
            torch.autograd.grad(output.float().square().sum(), leaves)

        step()  # compiles
        return peak_bytes(step, torch.device(DEVICE))

    if not ON_GPU and padded:
        pytest.skip("on a CPU a short padded mask is a matrix")
    assert peak(2 * unit) <= 2.1 * peak(unit)


@pytest.mark.parametrize("backend", ["tiled", "packed", "sdpa"])
def test_dropout_is_the_same_in_both_passes(backend: str) -> None:
    """The output is linear in the values, so with the mask of the forward pass <grad_value, value> = <output, g>."""
    query, key, value = inputs(130, 130, torch.float32)
    mask = make_mask(130, 130, True, True)
    value.requires_grad_()
    output = backends.attend(query, key, value, mask, scaling=0.2, dropout=0.3, backend=backend)
    direction = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, value, direction)
    left, right = ((a.double() * b.double()).sum() for a, b in ((gradient, value), (output, direction)))
    scale = (output.double() * direction.double()).abs().sum()
    assert (left - right).abs() <= 130 * torch.finfo(torch.float32).eps * scale
    undropped = backends.attend(query, key, value, mask, scaling=0.2, backend=backend)
    assert (output - undropped).abs().max() > 0.1
