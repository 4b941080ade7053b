"""The bars that the attention implementations are held to, each a ratio of two sides timed alternately.

Both sides of a ratio run in the same rounds, so the bar does not depend on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.experiment.benchmarking.candidates import (
    PARTS,
    Attend,
    Candidate,
    Problem,
    candidates,
    flex_failure,
    make_call,
)
from hf_attnkit.experiment.benchmarking.measure import peak_bytes, quartiles, time_alternately

UNIT = 4096  # tokens; every length of a bar is a multiple or a fraction


@dataclass(frozen=True)
class Side:
    """One side of a ratio."""

    label: str
    part: str
    problem: Problem

    @property
    def name(self) -> str:
        return f"{self.label} {self.problem.length}"


@dataclass(frozen=True)
class Bar:
    """`over / under`, where `under` with several sides means the fastest of them.

    Attributes:
        limit: "at most" or "at least" and a number; None where no bar is set and the ratio is only reported.
        unit: "seconds", or "bytes" at the peak.
    """

    what: str
    over: Side
    under: tuple[Side, ...]
    limit: tuple[str, float] | None
    unit: str = "seconds"


def bars(device: torch.device, unit: int = UNIT) -> list[Bar]:
    """The bars for a device; `unit` shrinks all lengths alike, for a test."""
    short, double, long = unit, 2 * unit, 4 * unit
    window = max(1, unit // 16)
    plain = Problem(double, window=window, device=device)
    both, step, once = PARTS["backward"], PARTS["decode"], PARTS["forward"]

    def at(length: int) -> Problem:
        return replace(plain, length=length)

    def side(label: str, part: str, length: int) -> Side:
        return Side(label, part, at(length))

    grouped = replace(plain, num_attention_heads=32, num_key_value_heads=8, head_dim=128, is_decode=True)
    windowed = side("sliding_window", "backward", double)
    found = [
        Bar(
            f"SDPA with the dense mask over sliding_window: {double:,} tokens, window {window}, {both}",
            side("sdpa_window", "backward", double),
            (windowed,),
            ("at least", 5.0),
        ),
        Bar(
            f"sliding_window, {long:,} over {double:,} tokens, window {window}, {both}",
            side("sliding_window", "backward", long),
            (windowed,),
            ("at most", 2.3),
        ),
        *(
            Bar(
                f"flash over SDPA, causal, {short:,} tokens, {PARTS[part]}",
                side("flash", part, short),
                (side("sdpa", part, short),),
                ("at most", 1.05),
            )
            for part in ("forward", "backward")
        ),
        # Linear in the length means at most twice; one percent is for how allocators round.
        Bar(
            f"peak memory of flash_tiled, {long:,} over {double:,} tokens, {both}",
            side("flash_tiled", "backward", long),
            (side("flash_tiled", "backward", double),),
            ("at most", 2.02),
            "bytes",
        ),
        Bar(
            f"repeat_kv and SDPA over gqa: {step}, 32 over 8 heads, {double:,} cached tokens",
            Side("sdpa", "decode", grouped),
            (Side("gqa", "decode", grouped),),
            ("at least", 5.0),
        ),
        Bar(
            f"linear, causal, {long:,} over {short:,} tokens, {once}",
            side("linear", "forward", long),
            (side("linear", "forward", short),),
            ("at most", 4.5),
        ),
    ]
    return found + (_cuda_bars(device, unit) if device.type == "cuda" else [])


def _cuda_bars(device: torch.device, unit: int) -> list[Bar]:
    """On CUDA also the fastest kernels there, in bfloat16, from a quarter of the unit to eight units."""
    big = Problem(
        unit, num_attention_heads=16, num_key_value_heads=16, head_dim=128, window=max(1, unit // 16),
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    found = []
    rivals = {"flash": ("sdpa_cudnn", "sdpa_flash", "flex_causal"), "sliding_window": ("flex_window",)}
    for label, others in rivals.items():
        if flex_failure(device):
            others = tuple(other for other in others if not other.startswith("flex"))
        for part in ("forward", "backward"):
            for length in (unit // 4, unit // 2, unit, 2 * unit, 4 * unit, 8 * unit):
                problem = replace(big, length=length)
                under = tuple(Side(other, part, problem) for other in others)
                what = f"{label} over the fastest of {', '.join(others)}: bfloat16, {length:,} tokens, {PARTS[part]}"
                if under:
                    found.append(Bar(what, Side(label, part, problem), under, None))
    # Far more than any cache holds: 2 GiB of keys and values.
    cache = replace(big, length=8 * unit, batch_size=16, num_attention_heads=32, num_key_value_heads=8, is_decode=True)
    what = f"gqa decode step, bfloat16, 16 x {cache.length:,} cached tokens: share of the bandwidth of a copy"
    return [*found, Bar(what, Side("copy", "decode", cache), (Side("gqa", "decode", cache),), None)]


def _copy(problem: Problem) -> Attend:
    """Copies the keys: as many bytes read and written as a decode step reads of keys and values."""
    copies: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not copies:
            copies.append(torch.empty_like(key))
        return copies[0].copy_(key)

    return attend


def measure_bars(
    chosen: list[Bar], repeats: int, step: Callable[[str], object] = lambda label: None
) -> list[dict[str, Any]]:
    """One record a bar: the ratio, its quartiles over the rounds, the limit, whether it is met, raw numbers."""
    return [_measure(bar, repeats, step) for bar in chosen]


def _measure(bar: Bar, repeats: int, step: Callable[[str], object]) -> dict[str, Any]:
    sides = (bar.over, *bar.under)
    rows: Mapping[str, Candidate] = candidates(bar.over.problem.window) | {"copy": Candidate(_copy)}
    calls = {side.name: make_call(rows[side.label], side.problem, side.part) for side in sides}
    device = bar.over.problem.device
    raw: Mapping[str, list[float]]
    if bar.unit == "bytes":
        raw = {}
        for name, call in calls.items():
            step(name)
            raw[name] = [float(peak_bytes(call, device))]
    else:
        raw = time_alternately(calls, repeats, device, step)
    medians = {name: quartiles(values)[1] for name, values in raw.items()}
    best = min((side.name for side in bar.under), key=lambda name: medians[name])
    ratio = medians[bar.over.name] / medians[best]
    lower, _, upper = quartiles([a / b for a, b in zip(raw[bar.over.name], raw[best], strict=True)])
    is_met = None
    if bar.limit is not None:
        direction, number = bar.limit
        is_met = ratio <= number if direction == "at most" else ratio >= number
    return {
        "what": bar.what,
        "ratio": ratio,
        "ratio_quartiles": [lower, upper],
        "bar": bar.limit and " ".join(map(str, bar.limit)),
        "is_met": is_met,
        "over": bar.over.name,
        "under": best,
        bar.unit: raw,
    }


def samples(chosen: list[Bar], repeats: int) -> int:
    """How often `measure_bars` calls `step`."""
    return sum((1 + len(bar.under)) * (1 if bar.unit == "bytes" else repeats + 1) for bar in chosen)
