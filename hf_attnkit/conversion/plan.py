"""What a conversion would do and lose, computed before any weight is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.conversion import budget as budgets
from hf_attnkit.conversion import grouping as groupings
from hf_attnkit.conversion import head_numbers as targets
from hf_attnkit.conversion import heads
from hf_attnkit.conversion.methods.table import METHODS, group_loss, merge, transforms, uses_statistics
from hf_attnkit.conversion.statistics import Statistics, collect, identity, require_finite
from hf_attnkit.editing.change import Change
from hf_attnkit.editing.projections import Edit
from hf_attnkit.models.cache_size import cache_bytes
from hf_attnkit.models.layers import AttentionLayer, editable_layers


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part of a plan.

    Attributes:
        groups: the present key/value heads that each new one replaces.
        key_loss, value_loss: predicted share of the energy of scores and outputs that is lost; 0 is exact,
            lower is better, see `conversion.loss`.
    """

    index: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    groups: tuple[tuple[int, ...], ...]
    key_loss: float
    value_loss: float


@dataclass(frozen=True, eq=False)
class GQAPlan:
    """A conversion that was computed and not made: prints as a table, `apply` makes it.

    Attributes:
        method, key_method: for values and for keys.
        layers: one `LayerPlan` each.
        num_tokens: of the calibration; `None` without.
        bytes_before, bytes_after: of the key/value cache per token, all layers.
    """

    model: PreTrainedModel = field(repr=False)
    method: str
    key_method: str
    layers: tuple[LayerPlan, ...]
    num_tokens: int | None
    bytes_before: int
    bytes_after: int
    _change: Change = field(repr=False)
    _weights: list[tuple[Tensor, int]] = field(repr=False)

    @plain_mode()
    def apply(self) -> PreTrainedModel:
        """Change the model to what was planned, and return it.

        Raises:
            RuntimeError: if the model's projections are not the ones that were planned for.
        """
        self._start()
        return self.model

    def _start(self) -> Change:
        for weight, version in self._weights:
            if weight._version != version:
                raise RuntimeError("the model's weights were changed after the plan was made; make a new one")
        if not self._change.is_current():
            raise RuntimeError(
                "the model's attention projections are not those of the plan (it was converted or pruned since, or the "
                "plan was applied already); make a new one"
            )
        self._change.apply()
        return self._change

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "key/value heads", "groups", "key loss", "value loss")]
        for layer in self.layers:
            present = sum(len(group) for group in layer.groups)
            groups = " ".join(",".join(map(str, group)) for group in layer.groups)
            losses = f"{layer.key_loss:.4f}", f"{layer.value_loss:.4f}"
            rows.append((str(layer.index), f"{present} -> {layer.num_key_value_heads}", groups, *losses))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [*lines, summary(self.method, self.key_method, self.num_tokens, self.bytes_before, self.bytes_after)]
        )


def summary(method: str, key_method: str, num_tokens: int | None, bytes_before: int, bytes_after: int) -> str:
    """One line about a conversion."""
    keys = "" if key_method == method else f" (keys: {key_method})"
    data = "no calibration" if num_tokens is None else f"{num_tokens:,} calibration tokens"
    return f"method {method}{keys}, {data}; cache {bytes_before:,} -> {bytes_after:,} bytes per token"


@plain_mode()
def plan_gqa(
    model: PreTrainedModel,
    num_key_value_heads: int | Sequence[int] | None = None,
    *,
    budget: float | None = None,
    uniform: bool = True,
    method: str = "mean",
    key_method: str | None = None,
    calibration: Iterable[Mapping[str, Any]] | Statistics | None = None,
    grouping: str = "adjacent",
) -> GQAPlan:
    """Compute a conversion to grouped-query attention and what it is predicted to lose. The model is not changed.

    Args:
        num_key_value_heads: for all layers, or a list with one for each. See `convert_to_gqa`.
        budget: instead, the share of the present key/value cache that may stay, in (0, 1).
        uniform: whether a budget gives all layers the same number, which plain Transformers and other
            runtimes can load; else it is spent over the layers where fewer heads would lose most.
        method: of `METHODS`.
        key_method: another one for the keys.
        calibration: batches of model inputs, or the `Statistics` of some.
        grouping: "adjacent", or "best", the groups that lose least.

    Raises:
        ValueError: as `convert_to_gqa`.
    """
    layers = editable_layers(model)
    key_method = method if key_method is None else key_method
    check(layers, method, key_method, grouping)
    if budget is not None and num_key_value_heads is not None:
        raise ValueError("give num_key_value_heads or budget, not both")
    if not uniform and budget is None:
        raise ValueError("uniform=False spends a budget over the layers; give budget, or a list as num_key_value_heads")
    same = uses_statistics(method) or uses_statistics(key_method)  # these change bases even one by one
    if budget is not None:
        targets.check_budget(layers, budget)
    if budget is None or uniform:
        # Before a long calibration, so that a wrong number costs nothing.
        numbers = targets.numbers(layers, num_key_value_heads, budget, allow_same=same)
    statistics = _statistics(model, layers, calibration)
    if budget is not None and not uniform:
        options = [targets.possible([layer], allow_same=True) for layer in layers]
        losses = [
            {number: _loss(layer, number, moment, method, key_method, grouping) for number in possible}
            for layer, moment, possible in zip(
                tqdm(layers, desc="losses", unit="layer"), statistics.second_moments, options, strict=True
            )
        ]
        total = int(budget * sum(layer.num_key_value_heads for layer in layers) + 1e-9)
        numbers = budgets.spend(losses, total)
    require_tokens(layers, numbers, statistics.num_tokens, (method, key_method))

    edits: list[Edit] = []
    planned = []
    for layer, number, moment in zip(
        tqdm(layers, desc=f"merging heads ({method})", unit="layer"), numbers, statistics.second_moments, strict=True
    ):
        present = heads.read(layer)
        groups = _groups(present, number, moment, method, key_method, grouping)
        merged = merge(present, groups, moment, method, key_method)
        edits += heads.write(layer, merged.heads, merged.constant)
        planned.append(
            LayerPlan(
                layer.index, layer.num_heads, number, layer.head_dim,
                tuple(tuple(group) for group in groups), merged.key_loss, merged.value_loss,
            )
        )  # fmt: skip
    sizes = [[(layer.num_key_value_heads, layer.head_dim) for layer in part] for part in (layers, planned)]
    weights = [getattr(layer, name).weight for layer in layers for name in ("query", "key", "value", "output")]
    change = Change(model, edits, [(layer.num_heads, layer.num_key_value_heads) for layer in planned])
    before, after = (cache_bytes(size, model.dtype) for size in sizes)
    return GQAPlan(
        model, method, key_method, tuple(planned), statistics.num_tokens, before, after,
        change, [(weight, weight._version) for weight in weights],
    )  # fmt: skip


def check(layers: Sequence[AttentionLayer], method: str, key_method: str, grouping: str) -> None:
    """Raise `ValueError` for names that do not exist or do not fit the model."""
    for argument, name in (("method", method), ("key_method", key_method)):
        if name not in METHODS:
            raise ValueError(f"unknown {argument} {name!r}; available: {', '.join(METHODS)}")
    if grouping not in groupings.GROUPINGS:
        raise ValueError(f"grouping={grouping!r} must be one of {', '.join(map(repr, groupings.GROUPINGS))}")
    if grouping == "best" and "random" in (method, key_method):
        raise ValueError(
            "grouping='best' looks for the least loss, and method 'random' does not aim at one; leave it out"
        )
    if empty := [layer.index for layer in layers if layer.is_empty]:
        raise ValueError(
            f"layers {empty} have no heads left, so there are none to merge; convert first, and remove all heads of a "
            "layer after"
        )
    if transforms(key_method):
        for layer in layers:
            if layer.norm:
                names = [name for name in METHODS if not transforms(name)]
                raise ValueError(
                    f"method {key_method!r} gives keys another basis, but {layer.norm} of layer {layer.index} stands "
                    f"between the key projection and the scores and would not follow; give key_method, one of "
                    f"{', '.join(names)}: values are then still merged by method={method!r}"
                )


def _statistics(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    calibration: Iterable[Mapping[str, Any]] | Statistics | None,
) -> Statistics:
    if calibration is None:
        return identity(layers)
    if not isinstance(calibration, Statistics):
        return collect(model, layers, calibration)
    require_sizes(layers, [len(moment) for moment in calibration.second_moments])
    for index, moment in enumerate(calibration.second_moments):
        require_finite(moment, index)
    return calibration


def require_sizes(layers: Sequence[AttentionLayer], given: Sequence[int]) -> None:
    """Raise `ValueError` if statistics of these sizes are of another model."""
    sizes = [layer.key.in_features + 1 for layer in layers]
    if sizes != list(given):
        raise ValueError(
            f"the calibration statistics are of {len(given)} layers of sizes {sorted(set(given))}, the model has "
            f"{len(sizes)} of sizes {sorted(set(sizes))}; collect them with this model"
        )


def require_tokens(
    layers: Sequence[AttentionLayer], numbers: Sequence[int], num_tokens: int | None, methods: tuple[str, str]
) -> None:
    """Raise `ValueError` if the statistics are of too few tokens for a merge; `None` is the identity."""
    if num_tokens is None or not any(uses_statistics(method) for method in methods):
        return
    for layer, number in zip(layers, numbers, strict=True):
        needed = layer.num_key_value_heads // number * layer.head_dim
        if num_tokens < needed:
            raise ValueError(
                f"{num_tokens} calibration tokens are too few: layer {layer.index} merges heads of {needed} "
                f"components together, whose second moment needs at least as many tokens; give more, or none"
            )


def _groups(
    present: heads.Heads, number: int, moment: Tensor, method: str, key_method: str, grouping: str
) -> groupings.Grouping:
    count = len(present.key)
    if grouping == "adjacent":
        return groupings.adjacent(count, number)
    return groupings.best(count, number, group_loss(present, moment, method, key_method))


def _loss(layer: AttentionLayer, number: int, moment: Tensor, method: str, key_method: str, grouping: str) -> float:
    present = heads.read(layer)
    if number == len(present.key):
        return 0.0
    merged = merge(present, _groups(present, number, moment, method, key_method, grouping), moment, method, key_method)
    return merged.key_loss + merged.value_loss
