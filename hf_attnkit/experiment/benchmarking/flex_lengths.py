"""FlexAttention compiled once for all lengths (`dynamic=True`) against once for each (`dynamic=False`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attnkit.attention.kernels import backends
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.benchmarking.backends import Problem, Sizes, first_call, make_call
from hf_attnkit.experiment.benchmarking.measure import Call, quartiles, time_alternately
from hf_attnkit.experiment.benchmarking.tables import Grid

WAYS = {"each length": False, "all lengths": True}


def compare(
    lengths: Sequence[int],
    dtype: torch.dtype,
    part: str,
    sizes: Sizes,
    repeats: int,
    stop: float,
    step: Callable[[str], object] = lambda label: None,
) -> list[dict[str, Any]]:
    """A record for each length and way, in the order given: a length's first call follows those before it.

    Args:
        stop: `time.perf_counter()` after which no further length is begun.
    """  # fmt: skip
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = {way: torch.compile(flex_attention, dynamic=dynamic) for way, dynamic in WAYS.items()}
    found: list[dict[str, Any]] = []
    for length in lengths:
        if time.perf_counter() > stop:
            break
        problem = Problem("causal, padded", length, dtype, part, sizes)
        inputs, mask = problem.inputs(), problem.mask()
        with torch.no_grad():
            query, key, value = (x.double() for x in inputs)
            exact = backends.attend(query, key, value, mask, scaling=sizes.head_dim**-0.5, backend="tiled")
        calls: dict[str, Call] = {}
        records: dict[str, dict[str, Any]] = {}
        for way, function in compiled.items():
            step(f"FlexAttention, {length:,} tokens, compiled for {way}")

            def attend(
                query: Tensor, key: Tensor, value: Tensor, function: Any = function, mask: Mask = mask
            ) -> Tensor:
                blocks = backends._flex_blocks(query, key, mask, None)
                output: Tensor = function(
                    query, key, value, block_mask=blocks, scale=sizes.head_dim**-0.5,
                    enable_gqa=query.shape[1] != key.shape[1],
                )  # fmt: skip
                return output

            call = make_call(problem, inputs, attend)
            with torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096):
                seconds, reason = first_call(call, sizes.device)
            records[way] = {"length": length, "part": part, "compiled for": way, "first_call_seconds": seconds}
            if reason is not None:
                records[way]["reason"] = reason
                continue
            with torch.no_grad():
                off = (attend(inputs[0], inputs[1], inputs[2]).double() - exact).abs().max()
            records[way]["largest_error"] = float(off)
            calls[way] = call
        raw = time_alternately(calls, repeats, sizes.device) if calls else {}
        for way, values in raw.items():
            records[way] |= {"median_seconds": quartiles(values)[1], "quartiles_seconds": quartiles(values)[::2],
                             "seconds": values}  # fmt: skip
        found += records.values()
    return found


def table(records: Sequence[dict[str, Any]]) -> Grid:
    rows = []
    for record in records:
        if "reason" in record:
            cells = [record["reason"], "-", "-"]
        else:
            cells = [f"{record['first_call_seconds']:.2f}", f"{record['median_seconds'] * 1e3:,.3g}",
                     f"{record['largest_error']:.1e}"]  # fmt: skip
        rows.append([f"{record['length']:,}, {record['part']}", record["compiled for"], *cells])
    return (
        "FlexAttention, causal, padded: lengths one after the other",
        ["tokens", "compiled for", "first call, s", "median ms", "largest error"],
        rows,
    )
