"""The backends of exact and windowed attention against each other, over the cases that `backend="auto"` tells apart.

Every backend that can compute a case runs in it, alternately with the others. The first call, which compiles and fills
the allocator, is reported by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.benchmarking.measure import Call, finish, quartiles, time_alternately
from hf_attnkit.experiment.benchmarking.tables import Grid

PARTS = {"forward": "forward", "backward": "forward + backward"}


@dataclass(frozen=True)
class Case:
    """What `backends.choose` looks at, besides the length.

    Attributes:
        is_padded: a quarter of the second row is padding, on the left.
        has_window, has_bias: as many keys as asked for, and a bias of the scores.
        is_decode: one query.
    """

    is_causal: bool = True
    is_padded: bool = False
    has_window: bool = False
    has_bias: bool = False
    is_decode: bool = False


# The most important first.
CASES = {
    "causal": Case(),
    "causal, padded": Case(is_padded=True),
    "bidirectional, padded": Case(is_causal=False, is_padded=True),
    "window": Case(has_window=True),
    "window, padded": Case(is_padded=True, has_window=True),
    "one query": Case(is_padded=True, is_decode=True),
    "window, bidirectional, padded": Case(is_causal=False, is_padded=True, has_window=True),
    "bias": Case(has_bias=True),
}


@dataclass(frozen=True)
class Sizes:
    """Of all problems."""

    batch_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int
    device: torch.device


@dataclass(frozen=True)
class Problem:
    """One measurement: a case at a length."""

    case: str
    length: int
    dtype: torch.dtype
    part: str
    sizes: Sizes

    @property
    def label(self) -> str:
        return f"{self.case}, {self.length:,} tokens, {str(self.dtype).removeprefix('torch.')}, {PARTS[self.part]}"

    @property
    def window(self) -> int | None:
        return self.sizes.window if CASES[self.case].has_window and self.sizes.window < self.length else None

    def inputs(self) -> list[Tensor]:
        sizes, queries = self.sizes, 1 if CASES[self.case].is_decode else self.length
        generator = torch.Generator(sizes.device).manual_seed(0)
        heads = ((sizes.num_attention_heads, queries), *[(sizes.num_key_value_heads, self.length)] * 2)
        return [
            torch.randn(
                (sizes.batch_size, number, tokens, sizes.head_dim), generator=generator, device=sizes.device,
                dtype=self.dtype,
            ).requires_grad_(self.part == "backward")
            for number, tokens in heads
        ]  # fmt: skip

    def mask(self) -> Mask:
        case, sizes = CASES[self.case], self.sizes
        visible = torch.ones(sizes.batch_size, self.length, dtype=torch.bool, device=sizes.device)
        visible[1:, : self.length // 4] = False
        queries = 1 if case.is_decode else self.length
        # With one query the models' masks hide nothing but padding.
        mask = Mask.aligned(
            queries, self.length, is_causal=case.is_causal and not case.is_decode,
            key_visible=visible if case.is_padded else None, device=sizes.device,
        )  # fmt: skip
        if not case.has_bias:
            return mask
        generator = torch.Generator(sizes.device).manual_seed(1)
        shape = (1, sizes.num_attention_heads, queries, self.length)
        bias = torch.randn(shape, generator=generator, device=sizes.device, dtype=self.dtype)
        return Mask(mask.query_position, mask.key_position, mask.is_causal, key_visible=mask.key_visible, bias=bias)


def problems(
    cases: Sequence[str], lengths: Sequence[int], dtypes: Sequence[torch.dtype], parts: Sequence[str], sizes: Sizes
) -> Iterator[Problem]:
    """All of them, the most important first: short before long, as asked for in the rest."""
    for dtype in dtypes:
        for length in sorted(lengths):
            for case in (case for case in CASES if case in cases):
                for part in parts:
                    if not (CASES[case].is_decode and part == "backward"):
                        yield Problem(case, length, dtype, part, sizes)


def obstacle(backend: str, problem: Problem, inputs: Sequence[Tensor], mask: Mask, max_quadratic: int) -> str | None:
    """Why a backend is not measured there, or `None`."""
    if (
        problem.length > max_quadratic
        and (backend == "packed" or problem.case == "bias")
        and mask.query_position.shape[1] > 1
    ):
        return f"memory is quadratic: only up to --max_quadratic {max_quadratic}"
    with torch.set_grad_enabled(problem.part == "backward"):
        return backends.refusal(backend, inputs[0], inputs[1], mask, window=problem.window)


def make_call(problem: Problem, inputs: Sequence[Tensor], attend: Callable[..., Tensor]) -> Call:
    """Runs it once: the forward pass without gradients, or both passes."""
    if problem.part == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*inputs)

        return forward
    gradient = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(attend(*inputs), list(inputs), gradient)


def measure(
    problem: Problem, repeats: int, max_quadratic: int, step: Callable[[str], object] = lambda label: None
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """One record, `None` where nothing runs, and what was left out with the reason."""
    inputs, mask = problem.inputs(), problem.mask()
    calls: dict[str, Call] = {}
    first: dict[str, float] = {}
    left_out = []
    with torch.set_grad_enabled(problem.part == "backward"):
        chosen, why = backends.choose(inputs[0], inputs[1], mask, window=problem.window)
    for backend in backends.BACKENDS:
        asked = "auto" if backend == chosen else backend  # which puts a window into SDPA's matrix on a GPU
        reason = obstacle(asked, problem, inputs, mask, max_quadratic)
        if reason is None:

            def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = asked) -> Tensor:
                scaling = problem.sizes.head_dim**-0.5
                return backends.attend(query, key, value, mask, scaling=scaling, window=problem.window, backend=backend)

            step(f"{problem.label}, {backend}")
            torch._dynamo.reset()
            call = make_call(problem, inputs, attend)
            seconds, reason = first_call(call, problem.sizes.device)
            if reason is None:
                calls[backend], first[backend] = call, seconds
        if reason is not None:
            left_out.append({"problem": problem.label, "backend": backend, "reason": reason})
    if not calls:
        return None, left_out
    raw = time_alternately(calls, repeats, problem.sizes.device)
    medians = {name: quartiles(values)[1] for name, values in raw.items()}
    fastest = min(medians, key=medians.__getitem__)
    record = {
        "case": problem.case, "length": problem.length, "dtype": str(problem.dtype).removeprefix("torch."),
        "part": problem.part, "auto": chosen, "why": why, "fastest": fastest,
        "auto_to_fastest": medians[chosen] / medians[fastest] if chosen in medians else None,
        "median_seconds": medians, "quartiles_seconds": {n: quartiles(v)[::2] for n, v in raw.items()},
        "first_call_seconds": first, "seconds": raw,
    }  # fmt: skip
    return record, left_out


def first_call(call: Call, device: torch.device) -> tuple[float, str | None]:
    """Its seconds, nothing compiled before, and why it does not run, or `None`."""
    start = time.perf_counter()
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            call()
        finish(device)
    except Exception as error:  # whatever a compiler or an allocator reports; shown with the results
        return 0.0, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return time.perf_counter() - start, None


def tables(results: dict[str, Any]) -> list[Grid]:
    """Medians of each backend, the fastest, what "auto" takes; then the first calls."""
    found = results["measurements"]
    names = [name for name in backends.BACKENDS if any(name in record["median_seconds"] for record in found)]
    grids = []
    for dtype in dict.fromkeys(record["dtype"] for record in found):
        for part, title in PARTS.items():
            rows, first = [], []
            for record in (r for r in found if (r["dtype"], r["part"]) == (dtype, part)):
                where = [f"{record['case']}, {record['length']:,}"]
                ratio = record["auto_to_fastest"]
                rows.append([
                    *where, *(_times(record, name) for name in names), record["fastest"], record["auto"],
                    "-" if ratio is None else f"{ratio:.2f}",
                ])  # fmt: skip
                seconds = record["first_call_seconds"]
                first.append([*where, *(f"{seconds[name]:.2f}" if name in seconds else "-" for name in names)])
            if rows:
                header = ["", *names, "fastest", "auto", "auto / fastest"]
                grids.append((f"{title}, {dtype}: median ms (interquartile range)", header, rows))
                grids.append((f"{title}, {dtype}: seconds of the first call", ["", *names], first))
    return grids


def _times(record: dict[str, Any], name: str) -> str:
    if name not in record["median_seconds"]:
        return "-"
    lower, upper = record["quartiles_seconds"][name]
    return f"{record['median_seconds'][name] * 1e3:,.3g} ({(upper - lower) * 1e3:.2g})"
