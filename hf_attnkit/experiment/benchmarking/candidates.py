"""What the benchmark compares: hf_attnkit's implementations and the baselines, one row each.

All are causal. `BASELINES` are what a model has without hf_attnkit; `implementations` are called as
its attention function calls them. Masks are made outside of what is timed, on both sides, because a
model makes them once for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import (
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS, Map
from hf_attnkit.attention.kernels.linear_sums import Keys, LinearState
from hf_attnkit.attention.kind import Call as AttentionCall
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.attention.table import make_kind
from hf_attnkit.experiment.benchmarking.measure import Call

PARTS = {"forward": "forward", "backward": "forward + backward", "decode": "decode step"}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value -> output, shapes as in `Kind.attention`


@dataclass(frozen=True)
class Problem:
    """One size; `length` counts tokens, in a decode step those in the cache, the new one included."""

    length: int
    batch_size: int = 1
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    window: int = 256
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_decode: bool = False

    @property
    def queries(self) -> int:
        return 1 if self.is_decode else self.length

    @property
    def groups(self) -> int:
        """Query heads for each key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        build: makes the function for a problem; what it does once per model or compile is not timed.
        computes: "causal", "window" or the name of what no other row computes.
        is_quadratic: its score matrix is held in memory.
        one_key_value_head: it takes inputs with one key/value head.
        kept: the bytes that a decode step of a model reads of the tokens before it, for a problem; `None` where a model
            keeps less for it than the keys that it gets here.
        implementation, options: of hf_attnkit; None and empty for a baseline.
    """

    build: Callable[[Problem], Attend]
    computes: str = "causal"
    is_quadratic: bool = False
    one_key_value_head: bool = False
    kept: Callable[[Problem], int] | None = None
    implementation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def obstacle(self, problem: Problem, part: str, max_quadratic: int) -> str | None:
        """Why this candidate is not measured there, or None."""
        if self.is_quadratic and part != "decode" and problem.length > max_quadratic:
            return f"memory is quadratic: only up to --max_quadratic {max_quadratic}"
        if self.build is _sdpa_gqa and problem.groups == 1:
            return "the same as sdpa where each query head has its own key/value head"
        if self.build in (_sdpa_cudnn, _sdpa_flash):
            if problem.device.type != "cuda":
                return "only on CUDA"
            if problem.dtype not in (torch.bfloat16, torch.float16):
                return "only in bfloat16 and float16"
        if self.build in (_flex_causal, _flex_window):
            if part == "backward" and problem.device.type == "cpu":
                return "FlexAttention has no backward pass on the CPU"
            return flex_failure(problem.device)
        return None


def implementations(window: int) -> dict[str, Candidate]:
    """The rows of hf_attnkit: label -> implementation and options."""
    return {
        "mha": _ours("mha", is_quadratic=True),
        "gqa": _ours("gqa", is_quadratic=True),
        "mqa": _ours("mqa", is_quadratic=True, one_key_value_head=True, computes="mqa"),
        "flash": _ours("flash", backend="auto"),
        "flash_tiled": _ours("flash", backend="tiled"),
        "sliding_window": _ours("sliding_window", computes="window", window=window),
        "local_global": _ours(
            "local_global", computes="local_global", window=window, num_global_tokens=1, num_random_blocks=0
        ),
        "linear": _ours("linear", computes="linear"),
    }


def forms_of_linear(window: int) -> dict[str, Candidate]:
    """Linear attention with each feature map, at its start, and with what else it can learn: label -> candidate.

    A decode step continues from the state, as in a model.
    """
    forms: dict[str, dict[str, Any]] = {f"linear_{name}": {"feature_map": name} for name in FEATURE_MAPS}
    forms["linear_decay"] = {"feature_map": "hedgehog", "decay": "learned"}
    forms["linear_window"] = {"feature_map": "hedgehog", "window": window, "gate": "learned"}
    return {label: _linear(label, **options) for label, options in forms.items()}


def _linear(label: str, **options: Any) -> Candidate:
    attention = LinearAttention(**options)
    width = attention.window or 1  # keys that a decode step is given

    def parameters(problem: Problem) -> torch.nn.Module | None:
        sizes = problem.num_attention_heads, problem.num_key_value_heads, problem.head_dim
        made = attention.create_parameters(*sizes)
        return None if made is None else made.to(problem.device)

    def state(problem: Problem, learned: torch.nn.Module | None) -> Tensor:
        """Over the keys that a step is not given."""
        _, key, value = make_inputs(problem, problem.num_key_value_heads)
        fixed = FEATURE_MAPS[attention.feature_map].fixed
        phi = cast(Map, fixed or getattr(learned, "key", None))
        keys = Keys(key, value, phi, None, None, getattr(learned, "decay", None))
        with torch.no_grad():
            return keys.state(0, max(problem.length - width, 0))

    def build(problem: Problem) -> Attend:
        learned, given = parameters(problem), slice(None)
        sums = state(problem, learned) if problem.is_decode else None
        if problem.is_decode:
            given = slice(max(problem.length - width, 0), None)
        keys = min(problem.length, width) if problem.is_decode else problem.length
        mask = Mask.receive(None, problem.queries, keys, is_causal=True, device=problem.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache: Any = LinearState(sums) if problem.is_decode else None
            key, value, scaling = key[:, :, given], value[:, :, given], problem.head_dim**-0.5
            return attention.attention(query, key, value, mask, scaling=scaling, call=AttentionCall(cache, learned))[0]

        return attend

    def kept(problem: Problem) -> int:
        near = 2 * (min(width, problem.length) - 1) * problem.head_dim * problem.dtype.itemsize
        small = replace(problem, length=1, is_decode=True)
        return state(small, parameters(small)).nbytes + problem.batch_size * problem.num_key_value_heads * near

    return Candidate(build, label, kept=kept, implementation="linear", options=options)


def _all_keys(problem: Problem) -> int:
    heads = problem.batch_size * problem.num_key_value_heads
    return 2 * heads * problem.length * problem.head_dim * problem.dtype.itemsize


def _one_head(problem: Problem) -> int:
    return _all_keys(problem) // problem.num_key_value_heads


def _ours(
    name: str, computes: str = "causal", is_quadratic: bool = False, one_key_value_head: bool = False, **options: Any
) -> Candidate:
    def build(problem: Problem) -> Attend:
        mask = Mask.receive(None, problem.queries, problem.length, is_causal=True, device=problem.device)
        attention = functools.partial(
            make_kind(name, options).attention, mask=mask, scaling=problem.head_dim**-0.5, dropout=0.0
        )
        return lambda query, key, value: attention(query, key, value)[0]

    kept = {"causal": _all_keys, "mqa": _one_head}.get(computes)
    return Candidate(build, computes, is_quadratic, one_key_value_head, kept, name, options)


def _eager(problem: Problem) -> Attend:
    """Transformers' eager attention, with the additive mask that it makes for it."""
    mask = _matrix(problem, eager_mask, causal_mask_function, dtype=problem.dtype)
    module = SimpleNamespace(num_key_value_groups=problem.groups, training=False)
    scaling = problem.head_dim**-0.5
    return lambda *inputs: eager_attention_forward(module, *inputs, mask, scaling)[0].transpose(1, 2)


def _matrix(problem: Problem, make: Callable[..., Any], visible: Callable[..., Any], **more: Any) -> Tensor:
    mask: Tensor = make(
        batch_size=1,
        q_length=problem.queries,
        kv_length=problem.length,
        q_offset=problem.length - problem.queries,
        mask_function=visible,
        allow_is_causal_skip=False,
        device=problem.device,
        **more,
    )
    return mask


def _sdpa(problem: Problem) -> Attend:
    """PyTorch's SDPA; grouped heads are repeated."""
    groups, is_causal = problem.groups, not problem.is_decode

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return attend


def _sdpa_gqa(problem: Problem) -> Attend:
    """PyTorch's SDPA with `enable_gqa`, which Transformers uses where no mask is needed."""
    return functools.partial(F.scaled_dot_product_attention, is_causal=not problem.is_decode, enable_gqa=True)


def _sdpa_window(problem: Problem) -> Attend:
    """PyTorch's SDPA with the dense mask that Transformers makes for a window."""
    mask = _matrix(problem, sdpa_mask, sliding_window_causal_mask_function(problem.window))
    groups = problem.groups

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


def _sdpa_backend(problem: Problem, backend: SDPBackend) -> Attend:
    is_causal, enable_gqa = not problem.is_decode, problem.groups > 1

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)

    return attend


def _sdpa_cudnn(problem: Problem) -> Attend:
    return _sdpa_backend(problem, SDPBackend.CUDNN_ATTENTION)


def _sdpa_flash(problem: Problem) -> Attend:
    return _sdpa_backend(problem, SDPBackend.FLASH_ATTENTION)


def _flex(problem: Problem, window: int) -> Attend:
    offset = problem.length - problem.queries

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        steps = query + offset - key
        return (steps >= 0) & (steps < window)

    mask = create_block_mask(visible, None, None, problem.queries, problem.length, device=problem.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask, enable_gqa=problem.groups > 1)


def _flex_causal(problem: Problem) -> Attend:
    return _flex(problem, window=problem.length)


def _flex_window(problem: Problem) -> Attend:
    return _flex(problem, window=problem.window)


@functools.cache
def flex_failure(device: torch.device) -> str | None:
    """Why compiled FlexAttention does not run on this machine, or None; it needs a compiler."""
    probe = torch.zeros(1, 1, 128, 64, device=device)
    try:
        with torch.no_grad():
            _flex_causal(Problem(length=128, device=device))(probe, probe, probe)
    except Exception as error:  # whatever the compiler reports; the reason is shown with the results
        return f"FlexAttention does not run here: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


BASELINES = {
    "eager": Candidate(_eager, is_quadratic=True, kept=_all_keys),
    "sdpa": Candidate(_sdpa, kept=_all_keys),
    "sdpa_gqa": Candidate(_sdpa_gqa, kept=_all_keys),
    "sdpa_cudnn": Candidate(_sdpa_cudnn, kept=_all_keys),
    "sdpa_flash": Candidate(_sdpa_flash, kept=_all_keys),
    "sdpa_window": Candidate(_sdpa_window, computes="window"),
    "flex_causal": Candidate(_flex_causal, kept=_all_keys),
    "flex_window": Candidate(_flex_window, computes="window"),
}


def candidates(window: int) -> dict[str, Candidate]:
    """All rows, baselines first."""
    return BASELINES | implementations(window) | forms_of_linear(window)


def usual() -> list[str]:
    """The rows that are measured unless others are asked for: one of linear attention."""
    return list(BASELINES | implementations(1))


def make_inputs(problem: Problem, num_key_value_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value; the same numbers for the same problem."""
    generator = torch.Generator(problem.device).manual_seed(0)
    heads = ((problem.num_attention_heads, problem.queries), *[(num_key_value_heads, problem.length)] * 2)
    query, key, value = (
        torch.randn(
            (problem.batch_size, count, tokens, problem.head_dim),
            generator=generator,
            dtype=problem.dtype,
            device=problem.device,
        )
        for count, tokens in heads
    )
    return query, key, value


def make_call(candidate: Candidate, problem: Problem, part: str) -> Call:
    """The function to measure: "backward" runs both passes, the others the forward without gradients."""
    one = candidate.one_key_value_head
    inputs = make_inputs(problem, 1 if one else problem.num_key_value_heads)
    attend = candidate.build(problem)
    if part != "backward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*inputs)

        return forward

    for tensor in inputs:
        tensor.requires_grad_()
    gradient = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)
