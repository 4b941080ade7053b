"""The backends of exact and windowed attention: each equals the definition, or says why it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_as_accurate, assert_exact64, gradients
from support.reference import Text, attend, window
from torch import Tensor

from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.kinds.flash import FlashAttention
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.attention.mask import Mask

each_direction = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def inputs(queries: int, keys: int, size: int = 8, **options: Any) -> list[Tensor]:
    options = {"dtype": torch.float64} | options
    return [torch.randn(shape, **options) for shape in [(2, 4, queries, size), (2, 2, keys, size), (2, 2, keys, size)]]


def make_mask(queries: int, keys: int, is_causal: bool, padded: bool, device: str = "cpu") -> Mask:
    seen = torch.ones(2, keys, dtype=torch.bool, device=device)
    seen[1, : keys // 3] = False
    return Mask.aligned(queries, keys, is_causal=is_causal, key_visible=seen if padded else None, device=device)


def allowed(mask: Mask, size: int | None) -> Tensor:
    """`(B, H, Q, K)` from the definition."""
    i, j = mask.query_position[:, :, None], mask.key_position[:, None, :]
    seen = (j <= i) if mask.is_causal else (j == j) & (i == i)
    seen = seen & mask.key_visible[:, None] if mask.key_visible is not None else seen
    seen = seen if size is None else seen & window(size, Text(i, j, i, j, mask.is_causal))
    return seen[:, None]


@each_direction
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("lengths", [(70, 70), (9, 70), (1, 70)], ids=str)
@pytest.mark.parametrize(
    ("backend", "size"),
    [("packed", None), ("packed", 6), ("tiled", None), ("tiled", 6), ("sdpa", None), ("auto", None), ("auto", 6)],
)
def test_equal_to_the_definition(
    backend: str, size: int | None, lengths: tuple[int, int], padded: bool, is_causal: bool
) -> None:
    mask, tensors = make_mask(*lengths, is_causal, padded), inputs(*lengths)
    seen = allowed(mask, size)
    got = gradients(lambda q, k, v: backends.attend(q, k, v, mask, scaling=0.4, window=size, backend=backend), *tensors)
    want = gradients(lambda q, k, v: attend(q, k, v, seen, scaling=0.4), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=70)


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("backend", ["packed", "tiled", "sdpa", "auto"])
def test_bias_and_matrix(backend: str, size: int | None) -> None:
    """A query that sees no key gives zeros with a bias too."""
    if (backend, size) == ("sdpa", 9):
        pytest.skip("SDPA takes no window, see test_refusals")
    tensors, bias = inputs(30, 30), torch.randn(1, 4, 30, 30, dtype=torch.float64)
    dense = torch.rand(2, 1, 30, 30) < 0.5
    dense[1, :, 4] = False
    positions = torch.arange(30)[None]
    mask = Mask(positions, positions, False, dense=dense, bias=bias)
    seen = dense if size is None else dense & ((positions.T - positions).abs() < size)
    got = gradients(lambda q, k, v: backends.attend(q, k, v, mask, scaling=0.4, window=size, backend=backend), *tensors)
    want = gradients(lambda q, k, v: attend(q, k, v, seen, scaling=0.4, bias=bias), *tensors)
    for actual, reference in zip(got, want, strict=True):
        assert_exact64(actual, reference, terms=30)
    assert not got[0][1, :, 4].any()


@pytest.mark.slow
def test_flex_forward_on_a_cpu() -> None:
    """Compiled with the system's compiler. PyTorch's limit of kernels for one function does not count: past it
    the uncompiled form would run."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for length, size in ((300, 40), (131, None)):
            mask, tensors = make_mask(length, length, length % 2 == 0, True), inputs(length, length, 16)
            query, key, value = (x.float() for x in tensors)
            options: dict[str, Any] = {"scaling": 0.3, "window": size}
            actual = backends.attend(query, key, value, mask, backend="flex", **options)
            plain = backends.attend(query, key, value, mask, backend="packed", **options)
            exact = attend(query.double(), key.double(), value.double(), allowed(mask, size), scaling=0.3)
            assert_as_accurate(actual, plain, exact, terms=length)


REFUSALS = [
    ("sdpa", {"window": 4}, {}, "cannot skip what is outside a window"),
    ("flex", {}, {"bias": torch.zeros(1, 1, 8, 8)}, "takes no bias and no full attention matrix"),
    ("flex", {}, {"dense": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "takes no bias and no full attention matrix"),
    ("flex", {"dropout": 0.1}, {}, "has no dropout"),
    ("flex", {}, {}, "takes no float64"),
    ("flash_attn", {}, {"bias": torch.zeros(1, 1, 8, 8)}, "takes no bias and no full attention matrix"),
]


@pytest.mark.parametrize(("backend", "options", "fields", "reason"), REFUSALS)
def test_refusals(backend: str, options: dict, fields: dict, reason: str) -> None:
    query, key, value = inputs(8, 8)
    positions = torch.arange(8)[None]
    mask = Mask(positions, positions, True, **fields)
    with pytest.raises(ValueError, match=f"backend='{backend}' {reason}; backend='auto' takes one that can"):
        backends.attend(query, key, value, mask, scaling=1.0, backend=backend, **options)
    assert torch.isfinite(backends.attend(query, key, value, mask, scaling=1.0, **options)).all()


def test_flex_refuses_gradients_on_a_cpu() -> None:
    query, key, value = inputs(8, 8)
    with pytest.raises(ValueError, match="backend='flex' has no backward pass on a CPU"):
        mask = Mask.aligned(8, 8, is_causal=True)
        FlashAttention(backend="flex").attention(query.requires_grad_(), key, value, mask, scaling=1.0)


def test_refusals_of_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed; a tensor on "meta" stands for one on a GPU."""
    cpu, mask = inputs(8, 8)[0], Mask.aligned(8, 8, is_causal=True)
    monkeypatch.setattr(backends, "_has_flash_attn", lambda: False)
    assert backends.refusal("flash_attn", cpu, cpu, mask) == "is not installed"
    with pytest.raises(ValueError, match=r"needs the flash-attn package, which is not installed: pip install flash"):
        FlashAttention(backend="flash_attn")
    monkeypatch.setattr(backends, "_has_flash_attn", lambda: True)
    FlashAttention(backend="flash_attn")
    assert "not cpu and torch.float64" in backends.refusal("flash_attn", cpu, cpu, mask)

    class OnGpu:
        """What `refusal` reads of a query."""

        device, dtype, requires_grad = torch.device("cuda"), torch.bfloat16, False

    def refusal(mask: Mask, **options: Any) -> str | None:
        return backends.refusal("flash_attn", OnGpu(), OnGpu(), mask, **options)

    assert refusal(mask) is None and refusal(mask, window=3, dropout=0.1) is None
    assert refusal(make_mask(8, 8, True, True)) == "takes no padding"
    for is_causal, size in ((True, None), (True, 3), (False, 3)):
        elsewhere = Mask(torch.arange(2)[None], torch.arange(8)[None], is_causal)
        assert refusal(elsewhere, window=size) == "wants the last query at the last key"
    assert refusal(Mask(torch.arange(2)[None], torch.arange(8)[None], False)) is None


@pytest.mark.parametrize("kind", [FlashAttention, SlidingWindowAttention])
def test_options_are_checked(kind: Any) -> None:
    with pytest.raises(ValueError, match="backend='fast' must be one of 'auto', 'tiled', 'packed', 'sdpa'"):
        kind(window=3, backend="fast")
    with pytest.raises(ValueError, match="window=0 must be"):
        kind(window=0)


def test_sliding_window_refuses_backends_that_cannot_serve_it() -> None:
    with pytest.raises(ValueError, match="backend='sdpa' cannot skip what is outside a window"):
        SlidingWindowAttention(window=3, backend="sdpa")
    for backend in ("packed", "flex"):
        with pytest.raises(ValueError, match=f"backend='{backend}' has no attention sinks"):
            SlidingWindowAttention(window=3, num_sink_tokens=1, backend=backend)
        SlidingWindowAttention(window=3, backend=backend)
    with pytest.raises(ValueError, match="num_sink_tokens=-1 must be an integer of at least 0"):
        SlidingWindowAttention(window=3, num_sink_tokens=-1)


CHOICES = [
    ((1, 70), True, False, {}, "packed"),  # a decode step
    ((1, 70), True, True, {"window": 4}, "packed"),
    ((70, 70), True, False, {}, "sdpa"),
    ((70, 70), False, True, {}, "sdpa"),  # padding alone is a row, not a matrix
    ((1025, 1025), True, True, {}, "tiled"),
    ((1024, 1024), True, True, {}, "sdpa"),
    ((9, 1070), True, False, {}, "tiled"),  # SDPA's causal mask stands at the first key
    ((1025, 1025), True, False, {"dropout": 0.1}, "tiled"),
    ((70, 70), True, False, {"dropout": 0.1}, "sdpa"),
    ((257, 257), True, False, {"window": 34}, "tiled"),
    ((257, 257), True, False, {"window": 300}, "sdpa"),
    ((70, 70), True, False, {"window": 35}, "packed"),
    ((70, 70), True, False, {"backend": "packed"}, "packed"),
]


@pytest.mark.parametrize(("lengths", "is_causal", "padded", "options", "expected"), CHOICES)
def test_choice_on_a_cpu(lengths: tuple, is_causal: bool, padded: bool, options: dict, expected: str) -> None:
    query, key, _ = inputs(*lengths)
    name, reason = backends.choose(query, key, make_mask(*lengths, is_causal, padded), **options)
    assert name == expected and reason


@pytest.mark.parametrize(("lengths", "is_causal", "padded", "options", "expected"), CHOICES)
def test_the_chosen_backend_runs(
    lengths: tuple, is_causal: bool, padded: bool, options: dict, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one and no other, with the result of the definition."""
    only = {expected: backends._RUN[expected]}
    monkeypatch.setattr(backends, "_RUN", only)
    mask, tensors = make_mask(*lengths, is_causal, padded), inputs(*lengths)
    output = backends.attend(*tensors, mask, scaling=1.0, **options)
    if not options.get("dropout"):
        assert_exact64(output, attend(*tensors, allowed(mask, options.get("window")), scaling=1.0), terms=70)


# On a GPU: tests/gpu. What is chosen there, from what `choose` reads of a query.


class OnGpu:
    device, requires_grad = torch.device("cuda"), True

    def __init__(self, length: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = torch.Size((2, 4, length, 64)), dtype

    def is_floating_point(self) -> bool:
        return True


GPU_CHOICES = [
    (5000, True, False, {}, "sdpa"),
    (5000, False, True, {}, "sdpa"),
    (5000, True, True, {}, "flex"),
    (5000, True, True, {"dropout": 0.1}, "tiled"),
    (5000, True, False, {"window": 34}, "flex"),
    (4096, True, True, {}, "sdpa"),
    (4096, True, True, {"dropout": 0.1}, "sdpa"),
    (4096, True, False, {"window": 34}, "sdpa"),
]


@pytest.mark.parametrize(("length", "is_causal", "padded", "options", "expected"), GPU_CHOICES)
def test_choice_on_a_gpu(length: int, is_causal: bool, padded: bool, options: dict, expected: str) -> None:
    query, mask = OnGpu(length), make_mask(length, length, is_causal, padded)
    name, reason = backends.choose(query, query, mask, **options)  # type: ignore[arg-type]
    assert name == expected and reason
    exact = backends.choose(OnGpu(length, torch.float64), query, mask, **options)[0]  # type: ignore[arg-type]
    assert exact == ("tiled" if expected == "flex" else expected)


def test_a_matrix_that_is_there_on_a_gpu() -> None:
    query, positions = OnGpu(5000), torch.arange(5000)[None]
    mask = Mask(positions, positions, True, bias=torch.zeros(1, 1, 1, 1))
    assert backends.choose(query, query, mask, window=34)[0] == "sdpa"  # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "expected"), [(2048, "sdpa"), (2049, "packed")])
def test_choice_for_one_query_on_a_gpu(keys: int, expected: str) -> None:
    query, key, mask = OnGpu(1), OnGpu(keys), make_mask(1, keys, True, True)
    assert backends.choose(query, key, mask)[0] == expected  # type: ignore[arg-type]


def test_few_queries_of_many_on_a_gpu() -> None:
    """FlexAttention has no kernel for them: a chunk of a long prefill."""
    query, key, mask = OnGpu(70), OnGpu(5000), make_mask(70, 5000, True, True)
    assert backends.choose(query, key, mask, window=34)[0] == "tiled"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes one query or at least 128 on a GPU"):
        backends.choose(query, key, mask, window=34, backend="flex")  # type: ignore[arg-type]


@pytest.mark.parametrize("padded", [False, True])
def test_a_window_through_sdpa(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU takes short ones: the window goes into the matrix."""
    tensors, mask = inputs(70, 70), make_mask(70, 70, True, padded)
    monkeypatch.setattr(backends, "choose", lambda *args, **options: ("sdpa", "as on a GPU"))
    output = backends.attend(*tensors, mask, scaling=1.0, window=9)
    assert_exact64(output, attend(*tensors, allowed(mask, 9), scaling=1.0), terms=70)
