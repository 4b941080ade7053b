"""`select_for_target`: as few heads as a measured time or a number of parameters asks for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.common.checks import integer, number
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.editing.cut_plan import parameters_cut, plan_cut
from hf_attnkit.models import known
from hf_attnkit.models.layers import scored_layers
from hf_attnkit.observing.batches import to_device
from hf_attnkit.pruning.prune import prune_heads
from hf_attnkit.pruning.select import Unit, heads_of, removable, units_of

REPEATS = 5


def select_for_target(
    model: PreTrainedModel,
    importance: Tensor,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    latency: float | None = None,
    parameters: float | None = None,
    per_layer: bool = False,
    min_heads: int = 1,
    groups: str = "whole",
    repeats: int = REPEATS,
) -> dict[int, list[int]]:
    """Choose the fewest of the least important heads whose removal reaches a target.

    Heads are removed in the order of `select_heads`, and bisection finds where to stop. For a latency each try prunes a
    copy of the model and measures it, so there must be room for a second model; with `s` steps, about log2(s) tries.

    Args:
        model: any model whose heads can be removed; unchanged.
        importance: `(num_layers, num_heads)`, higher = keep, as from `head_importance` of this model.
        batches: model inputs of the sizes that the latency is wanted for; for `latency` only.
        latency: share of the untouched model's forward time, in (0, 1): medians of runs of both, alternately. Do not
            choose by times of a machine that is busy with other work.
        parameters: share of the untouched model's parameters, in (0, 1); exactly one of the two is given.
        per_layer: remove one unit of every layer at a time, instead of the least important of all.
        min_heads, groups: as `select_heads`; the numbers of key/value heads are the model's.
        repeats: times that either model runs each batch.

    Returns:
        `{layer: [head, ...]}`, for `prune_heads`.

    Raises:
        TypeError, ValueError: as `select_heads` and `prune_heads`; for scores of another model; and if the target
            cannot be reached, saying what can.
    """
    if (latency is None) == (parameters is None):
        raise ValueError("give exactly one of latency and parameters")
    name, target = ("latency", latency) if latency is not None else ("parameters", parameters)
    target = number(target, name, above=0, below=1, why=f"the share of the untouched model's {name}")
    if latency is not None and batches is None:
        raise ValueError("latency is measured; give batches of model inputs")
    if latency is None and batches is not None:
        raise ValueError("parameters are counted, so batches would have no effect; leave them out")
    repeats = integer(repeats, "repeats", minimum=1)
    scored_layers(model)  # refuses what has no heads to score
    inputs = [to_device(batch, model) for batch in batches or ()]
    if latency is not None and not inputs:
        raise ValueError("batches is empty; give at least one batch of model inputs")
    _, units = units_of(importance, groups=groups, model=model)
    steps = _steps([removable(row, min_heads) for row in units], per_layer)

    def selection(count: int) -> dict[int, list[int]]:
        return heads_of(unit for step in steps[:count] for unit in step)

    def share(count: int) -> float:
        if latency is None:
            return parameter_share(model, selection(count))
        return forward_share(model, prune_heads(copy.deepcopy(model), selection(count)), inputs, repeats)

    # share(fewest) is above the target, share(most) at most the target.
    fewest, most = 0, len(steps)
    best = share(most) if steps else 1.0
    if best > target:
        raise ValueError(
            f"{name}={target} cannot be reached: without all the heads that may go (min_heads={min_heads}) the share "
            f"is {best:.4g}; ask for a larger one, or a smaller min_heads"
        )
    while most - fewest > 1:
        middle = (fewest + most) // 2
        if share(middle) <= target:
            most = middle
        else:
            fewest = middle
    return selection(most)


def parameter_share(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]) -> float:
    """Parameters of the model without these heads, as a share of what it has."""
    total = sum(parameter.numel() for parameter in model.parameters())
    attentions, owned = known.known(model).attentions, known.owned(model)
    plans = [plan_cut(attentions[index], owned[index], gone) for index, gone in heads.items()]
    return float(1 - parameters_cut(model, plans) / total)


def forward_share(
    model: PreTrainedModel,
    other: PreTrainedModel,
    inputs: Sequence[Mapping[str, Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Forward time of `other` as a share of that of `model`: medians of alternate runs, after one of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for runner, seconds in zip((model, other), times, strict=True):
            with torch.no_grad(), evaluation_mode(runner):
                _wait(runner)
                start = clock()
                for batch in inputs:
                    runner(**batch)
                _wait(runner)
                elapsed = clock() - start
                if turn:
                    seconds.append(elapsed)
    return float(median(times[1]) / median(times[0]))


def _wait(model: PreTrainedModel) -> None:
    """Until the device has done what it was given."""
    if model.device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(model.device)


def _steps(candidates: Sequence[Sequence[Unit]], per_layer: bool) -> list[list[Unit]]:
    """What goes at a time, in order."""
    if not per_layer:
        return [[unit] for unit in sorted(unit for row in candidates for unit in row)]
    longest = max(len(row) for row in candidates)
    return [[row[rank] for row in candidates if rank < len(row)] for rank in range(longest)]
