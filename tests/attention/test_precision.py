"""float32, bfloat16 and float16: the error against float64 is at most twice that of plain attention.

Plain attention is Transformers' eager function in the same precision with the same dense mask; for
linear attention, which Transformers does not have, its quadratic form in the same precision.
`flash` by default is PyTorch's SDPA on a CPU, whose rounding is not ours to bound.
"""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_as_accurate, gradients
from support.matrix import MATRIX, expected, run, visible
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_attnkit.attention.mask import Mask

LENGTH = 130


def plain(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    if MATRIX[name].features is not None:
        return expected(name, query, key, value, mask)
    module = nn.Module().eval()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    seen = visible(name, mask, query.shape[1], key.shape[1])
    bias = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    return eager_attention_forward(module, query, key, value, bias, query.shape[-1] ** -0.5)[0].transpose(1, 2)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in MATRIX.items() if case.kernel])
def test_error_against_float64(name: str, dtype: torch.dtype, is_causal: bool, scale: float) -> None:
    heads, kv_heads = (6, 3 if MATRIX[name].grouped else 1)
    shapes = [(2, heads, LENGTH, 24), (2, kv_heads, LENGTH, 24), (2, kv_heads, LENGTH, 24)]
    tensors = [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in shapes]
    # Right padding: every causal query sees a key, so eager attention is defined on every row.
    seen = torch.ones(2, LENGTH, dtype=torch.bool)
    seen[1, 100:] = False
    mask = Mask.aligned(LENGTH, LENGTH, is_causal=is_causal, key_visible=seen)

    def rows(output: Tensor) -> Tensor:
        """Padding's own rows left out: a window there may be empty, where eager is not 0."""
        return output * seen[:, None, :, None]

    ours = gradients(lambda *t: rows(run(name, *t, mask)), *tensors)
    theirs = gradients(lambda *t: rows(plain(name, *t, mask)), *tensors)
    exact = gradients(lambda *t: rows(expected(name, *t, mask)), *(x.double() for x in tensors))
    for actual, stock, truth in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(actual, stock, truth, terms=24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(MATRIX))
def test_large_scores_do_not_overflow(name: str, dtype: torch.dtype) -> None:
    """Scores near 1,000 and fully hidden rows: finite, and gradients too."""
    kv_heads = 2 if MATRIX[name].grouped else 1
    tensors = [40 * torch.randn(2, heads, 70, 16).to(dtype) for heads in (4, kv_heads, kv_heads)]
    seen = torch.ones(2, 70, dtype=torch.bool)
    seen[1] = False
    mask = Mask.aligned(70, 70, is_causal=True, key_visible=seen)
    for result in gradients(lambda *t: run(name, *t, mask), *tensors):
        assert result.dtype == dtype and torch.isfinite(result).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", [name for name, case in MATRIX.items() if case.kind.forms_scores])
def test_float16_scores_that_overflow_unless_scaled_first(name: str, is_causal: bool) -> None:
    """64 products of 36 * 40 exceed float16's 65,504; scaled by 1/8 they are 11,520, for all keys alike."""
    heads = 1 if name == "mqa" else 2
    query, key = torch.full((1, 2, 12, 64), 36.0), torch.full((1, heads, 12, 64), 40.0)
    value = torch.rand(1, heads, 12, 64, generator=torch.Generator().manual_seed(0)).half().double()
    assert (query.half() @ key.half().mT).isinf().any()
    mask = Mask.aligned(12, 12, is_causal=is_causal)
    found, wanted = (
        run(name, *(t.to(dtype) for t in (query, key, value)), mask) for dtype in (torch.half, torch.double)
    )
    # A mean of at most 12 values from 0 to 1: roundings of the weights, of the sum and of the output.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=4 * torch.finfo(torch.half).eps)
