"""The kernels that can compute exact or windowed softmax attention, and which one `"auto"` takes.

| backend      | runs                                                    | what it cannot                       |
| ------------ | ------------------------------------------------------- | ------------------------------------ |
| `tiled`      | our own kernel, `tiled.py`: any device, linear memory   | nothing                              |
| `packed`     | `packed.py`: one matrix product per group                  | linear memory                        |
| `sdpa`       | PyTorch's `scaled_dot_product_attention`                | a window; it reads a matrix for      |
|              |                                                         | causal padding                       |
| `flex`       | PyTorch's FlexAttention, compiled                       | dropout, biases, float64; backward   |
|              |                                                         | on a CPU; 2 to 127 queries on a GPU  |
| `flash_attn` | the flash-attn package                                  | padding, biases; float32; a CPU      |

`choose` says which one runs and why; a backend asked for by name runs or raises.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attnkit.attention.eight_bits import decode, is_encoded
from hf_attnkit.attention.kernels import packed, tiled
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.checks import choice

BACKENDS = ("tiled", "packed", "sdpa", "flex", "flash_attn")
FLEX_BLOCK = 128
# On a CPU; measured, see docs/benchmarks.md.
SHORT_WINDOW = 256
SHORT_MATRIX = 1024
# On a GPU: keys up to which SDPA reads a matrix (faster at 2,048, slower at 8,192; nothing was measured between).
SHORT_ON_GPU = 4096
# Up to which SDPA takes a single query there; nothing was measured above.
SHORT_QUERY_ON_GPU = 2048


Listener = Callable[[str, str], None]
_listeners: list[Listener] = []


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener(backend, reason)` whenever `attend` has chosen."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def check_backend(backend: str, window: int | None = None) -> None:
    """Raise `ValueError` unless it is "auto" or one of `BACKENDS`, installed, and able to run a window if given one."""
    choice(backend, "backend", ("auto", *BACKENDS))
    if backend == "flash_attn" and not _has_flash_attn():
        raise ValueError(
            "backend='flash_attn' needs the flash-attn package, which is not installed: pip install flash-attn, "
            "or backend='auto'"
        )
    if backend == "sdpa" and window is not None:
        raise ValueError("backend='sdpa' cannot skip what is outside a window; use 'auto', 'tiled' or 'flex'")


def choose(
    query: Tensor, key: Tensor, mask: Mask, *, dropout: float = 0.0, window: int | None = None, backend: str = "auto"
) -> tuple[str, str]:
    """Which backend computes this call, and why. Arguments as `attend`.

    Raises:
        ValueError: if the backend asked for cannot compute it.
    """
    if backend != "auto":
        if reason := refusal(backend, query, key, mask, dropout=dropout, window=window):
            raise ValueError(f"backend={backend!r} {reason}; backend='auto' takes one that can")
        return backend, "asked for"
    on_cpu = query.device.type == "cpu"
    if query.shape[2] == 1 and (on_cpu or key.shape[2] > SHORT_QUERY_ON_GPU or is_encoded(key)):
        return "packed", "one query reads every key once"
    if on_cpu:
        return _choose_cpu(mask, dropout, window, key.shape[2])
    return _choose_gpu(query, key, mask, dropout, window)


def _choose_cpu(mask: Mask, dropout: float, window: int | None, kv_length: int) -> tuple[str, str]:
    if window is not None and window < kv_length:
        if kv_length <= SHORT_WINDOW:
            return "packed", f"with up to {SHORT_WINDOW} keys there is little to skip"
        return "tiled", "skips what is outside the window"
    if mask.bias is not None:
        return "tiled", "adds a bias without a matrix of weights"
    needs_matrix = mask.dense is not None or not (mask.is_trivial or not mask.is_causal)
    if not needs_matrix and dropout == 0:
        return "sdpa", "fastest without a mask matrix"
    if kv_length <= SHORT_MATRIX:
        return "sdpa", f"with up to {SHORT_MATRIX} keys its matrix costs little"
    return "tiled", "SDPA would form a matrix of queries x keys"


def _choose_gpu(query: Tensor, key: Tensor, mask: Mask, dropout: float, window: int | None) -> tuple[str, str]:
    options: dict[str, Any] = {"dropout": dropout, "window": window}
    if mask.bias is not None or mask.dense is not None:
        return "sdpa", "its matrix is there already"
    if window is None and (mask.is_trivial or not mask.is_causal):
        return "sdpa", "PyTorch takes the fastest of cuDNN and flash attention"
    if refusal("flash_attn", query, key, mask, **options) is None:
        return "flash_attn", "skips what is hidden"
    if key.shape[2] <= SHORT_ON_GPU:
        return "sdpa", f"with up to {SHORT_ON_GPU} keys a matrix costs little, and nothing is compiled"
    if refusal("flex", query, key, mask, **options) is None:
        return "flex", "skips what is hidden"
    return "tiled", "no compiled kernel takes this combination of mask, dtype and dropout"


def refusal(
    backend: str, query: Tensor, key: Tensor, mask: Mask, *, dropout: float = 0.0, window: int | None = None
) -> str | None:
    """Why a backend cannot compute this call, or `None`."""
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if backend == "sdpa" and window is not None:
        return "cannot skip what is outside a window"
    if backend in ("flex", "flash_attn") and (mask.bias is not None or mask.dense is not None):
        return "takes no bias and no full attention matrix"
    if backend == "flex":
        if dropout > 0:
            return "has no dropout"
        if query.device.type == "cpu" and gradient:
            return "has no backward pass on a CPU"
        if query.device.type != "cpu" and 1 < query.shape[2] < FLEX_BLOCK:
            return f"takes one query or at least {FLEX_BLOCK} on a GPU"
        if query.dtype == torch.float64:
            return "takes no float64"
    if backend == "flash_attn":
        if not _has_flash_attn():
            return "is not installed"
        if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
            return f"needs a GPU and float16 or bfloat16, not {query.device.type} and {query.dtype}"
        if mask.key_visible is not None:
            return "takes no padding"
        if (mask.is_causal or window is not None) and mask.known_offset is None:
            return "wants the last query at the last key"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention, within a window if one is given, by the backend that `choose` names.

    Shapes as in `Kind.attention`; returns the output alone.
    """
    if window is not None and window >= key.shape[2] and mask.known_offset is not None:
        window = None  # nothing is outside
    name, reason = choose(query, key, mask, dropout=dropout, window=window, backend=backend)
    for listener in _listeners:
        listener(name, reason)
    if name not in ("packed", "tiled"):  # these read 8 bits block by block
        key, value = (decode(states, query.dtype) for states in (key, value))
    if window is not None and (mask.dense is not None or name == "sdpa"):
        mask, window = mask.also(mask.distance().abs() < window), None
    return _RUN[name](query, key, value, mask, scaling, dropout, window)


def _tiled(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, dropout: float, window: int | None
) -> Tensor:
    return tiled.attend(query, key, value, mask, scaling=scaling, dropout=dropout, window=window)[0]


def _packed(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, dropout: float, window: int | None
) -> Tensor:
    if window is not None:
        mask = mask.also(mask.distance().abs() < window)
    return packed.attention(query, key, value, mask, scaling=scaling, dropout=dropout)[0]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, dropout: float, window: int | None
) -> Tensor:
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    if mask.is_trivial:
        causal = mask.is_causal and query.shape[2] > 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, **options)
    matrix = mask.visible()
    # A query that sees no key gives zeros on a CPU; cuDNN gives it a mean of values, so on a GPU it is taken out.
    empty = None if matrix is None or query.device.type == "cpu" else ~matrix.any(-1, keepdim=True)
    if matrix is not None and empty is not None:
        matrix = matrix | empty
    if mask.bias is not None:
        bias = mask.bias.to(query.dtype)
        # Minus infinity, not the least number: only then gives a query that sees no key zeros.
        matrix = bias if matrix is None else bias.masked_fill(~matrix, -torch.inf)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=matrix, **options)
    return output if empty is None else output.masked_fill(empty, 0)


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, dropout: float, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_func

    # Its window counts the neighbours on each side, without the query's own key.
    before = -1 if window is None else window - 1
    output: Tensor = flash_attn_func(
        *(t.transpose(1, 2) for t in (query, key, value)),
        dropout_p=dropout, softmax_scale=scaling, causal=mask.is_causal,
        window_size=(before, 0 if mask.is_causal else before),
    )  # fmt: skip
    return output.transpose(1, 2)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float, dropout: float, window: int | None
) -> Tensor:
    blocks = _flex_blocks(query, key, mask, window)
    # On a GPU one kernel serves all lengths, as fast (docs/benchmarks.md); with a window that fails to compile.
    return _compiled_flex(query.device.type != "cpu" and window is None)(
        query, key, value, block_mask=blocks, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _flex_blocks(query: Tensor, key: Tensor, mask: Mask, window: int | None) -> Any:
    """The `BlockMask` of a mask, its blocks from arithmetic: `create_block_mask` forms all n^2 entries."""
    from torch.nn.attention.flex_attention import BlockMask

    q_length, kv_length, device = query.shape[2], key.shape[2], query.device
    offset, causal, visible = mask.offset(), mask.is_causal, mask.key_visible
    first = torch.arange(0, q_length, FLEX_BLOCK, device=device)[:, None] + offset
    last = (first + FLEX_BLOCK - 1).clamp(max=q_length - 1 + offset)
    start = torch.arange(0, kv_length, FLEX_BLOCK, device=device)[None]
    stop = (start + FLEX_BLOCK - 1).clamp(max=kv_length - 1)
    needed = torch.ones(first.shape[0], start.shape[1], dtype=torch.bool, device=device)
    if causal:
        needed &= start <= last
    if window is not None:
        needed &= stop > first - window
        needed &= (start < last + window) if not causal else True

    def visible_to(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q + offset - k
        seen = k >= 0  # all of them, without a length, which would be compiled in
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window) & (distance > -window)
        return seen if visible is None else seen & visible[b if visible.shape[0] > 1 else 0, k]

    number = needed.sum(-1, dtype=torch.int32)[None, None]
    order = needed.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]
    return BlockMask.from_kv_blocks(
        number, order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible_to, seq_lengths=(q_length, kv_length)
    )


@functools.cache
def _compiled_flex(dynamic: bool) -> Callable[..., Tensor]:
    """Compiled for all lengths, or for each."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=dynamic, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        # Past PyTorch's limit of 8 kernels the function would run uncompiled, which forms the whole matrix.
        with torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096):
            return compiled(*args, **kwargs)

    return run


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


_RUN: dict[str, Callable[..., Tensor]] = {
    "tiled": _tiled,
    "packed": _packed,
    "sdpa": _sdpa,
    "flex": _flex,
    "flash_attn": _flash_attn,
}
