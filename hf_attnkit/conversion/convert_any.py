"""Merge key/value heads of a model whose heads are found by running it.

    1  owned rows of keys and values (and of queries, where a method turns them) are read and merged, group by group
    2  the model is given the merged heads at full size, each repeated over its group; what it puts out then is noted
    3  all but the first of each group are cut, numbers of heads are found by running, and the result is proven:
       the smaller model puts out what the repeated heads did

Everything is undone if a step fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_attnkit.conversion import grouping as groupings
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.methods.table import METHODS, Merged, merge, transforms
from hf_attnkit.conversion.owned_heads import OwnedHeads, owned_heads
from hf_attnkit.conversion.report import ConversionReport, LayerPlan
from hf_attnkit.conversion.target_heads import target_heads
from hf_attnkit.conversion.turned_heads import rope_of
from hf_attnkit.editing.cut_heads import CutHeads, cut_planned
from hf_attnkit.editing.cut_plan import CutPlan, require_own_parameters
from hf_attnkit.editing.last_change import record_change
from hf_attnkit.editing.saved_cut import cache_bytes_of, require_no_adapters, require_nothing_learned_by, save_cut
from hf_attnkit.editing.stock_fields import into_stock_fields
from hf_attnkit.models.discovery import Discovery, discover
from hf_attnkit.models.ownership import ownerships


@dataclass(frozen=True)
class _Numbers:
    """What `target_heads` asks of a layer."""

    index: int
    num_heads: int
    num_key_value_heads: int


def convert_discovered(
    model: PreTrainedModel,
    num_key_value_heads: int | Sequence[int] | None,
    method: str | None,
    key_method: str | None,
    budget: float | None,
) -> PreTrainedModel:
    """Convert as `convert_to_gqa`, adjacent heads, without calibration.

    Raises:
        TypeError, ValueError: as `convert_to_gqa`; the model is then unchanged.
    """
    method = method or "mean"
    key_method = key_method or method
    for argument, name in (("method", method), ("key_method", key_method)):
        if name not in METHODS:
            raise ValueError(f"unknown {argument} {name!r}; available: {', '.join(METHODS)}")
    require_no_adapters(model)
    found = discover(model)
    require_nothing_learned_by(found.attentions)
    owned = ownerships(model, found.attentions)
    for attention in found.attentions:
        if not attention.calls_interface:
            raise ValueError(f"{attention.path}: its heads cannot share keys and values: {attention.reason}")
    layers = [
        _Numbers(each.index, each.num_heads, own.num_key_value_heads)
        for each, own in zip(found.attentions, owned, strict=True)
    ]
    numbers = target_heads(layers, num_key_value_heads, budget)  # type: ignore[arg-type]
    merges = [
        _merge(model, owned_heads(model, found.attentions[layer.index], owned[layer.index]), number, method, key_method)
        for layer, number in zip(layers, numbers, strict=True)
        if number < layer.num_key_value_heads
    ]
    plans = [one.plan for one in merges]
    require_own_parameters(model, plans)
    cut = CutHeads()
    try:
        outer = transforms(method) or transforms(key_method)
        for one in merges:
            one.of.write(one.merged.heads, one.group_size, cut.steps, outer=outer)
            one.set_group_number(cut)
        cut_planned(model, plans, found, cut)
        for one in merges:
            one.note_group_number(cut)
        save_cut(model, found, owned, cut)
        before = [(each.num_heads, own.num_key_value_heads) for each, own in zip(found.attentions, owned, strict=True)]
        after = [cut.heads.get(index, pair) for index, pair in enumerate(before)]
        into_stock_fields(model, found, cut, after)
    except BaseException:
        cut.undo()
        raise
    record_change(model, _report(found, before, after, merges, method, key_method, model.dtype.itemsize))
    return model


@dataclass(frozen=True)
class _Merge:
    """One attention's new heads."""

    of: OwnedHeads
    merged: Merged
    groups: list[tuple[int, ...]]

    @property
    def group_size(self) -> int:
        return len(self.groups[0])

    @property
    def plan(self) -> CutPlan:
        attention = self.of.attention
        firsts = tuple(group[0] for group in self.groups)
        return CutPlan(attention, self.of.owned, tuple(range(attention.num_heads)), firsts)

    @property
    def _queries_per_head(self) -> int:
        return self.of.attention.num_heads // len(self.groups)

    def set_group_number(self, cut: CutHeads) -> None:
        """Give a module that knows no groups the attribute by which Transformers' attention functions do.

        With as many key/value heads as query heads it means what the module did without, so it may come before the cut.
        """
        module = self.of.attention.module
        if not hasattr(module, _GROUPS) and self.of.owned.num_key_value_heads == self.of.attention.num_heads:
            cut.steps.set(module, _GROUPS, 1)

    def note_group_number(self, cut: CutHeads) -> None:
        """Note it with the other numbers."""
        numbers = cut.numbers[self.of.attention.path]
        if getattr(self.of.attention.module, _GROUPS, None) == self._queries_per_head:
            numbers[_GROUPS] = self._queries_per_head


_GROUPS = "num_key_value_groups"


def _merge(model: PreTrainedModel, of: OwnedHeads, number: int, method: str, key_method: str) -> _Merge:
    rope = None
    if transforms(method) or transforms(key_method):
        rope = rope_of(model, of, keys=transforms(key_method))
    heads = of.heads(rope)
    groups = [tuple(group) for group in groupings.adjacent(len(heads.key), number)]
    widths = {part.shape[-1] for part in (heads.query, heads.key, heads.value)}
    if of.query is not None and of.output is not None and len(widths) == 1:
        return _Merge(of, merge(heads, groups, _identity(heads.key), method, key_method), groups)
    if transforms(method) or transforms(key_method):
        raise ValueError(
            f"{of.attention.path}: queries, keys and values are of different inputs, so that heads cannot get another "
            "basis; give method='mean', 'norm_mean' or 'first'"
        )
    keys, values = [], []
    for group in map(list, groups):
        part = Heads(ABSENT, heads.key[group], heads.value[group], ABSENT)
        keys.append(METHODS[key_method].key(part, _identity(part.key))[1])
        values.append(METHODS[method].value(part, _identity(part.value))[0])
    new = Heads(ABSENT, torch.stack(keys), torch.stack(values), ABSENT)
    return _Merge(of, Merged(new, None, float("nan"), float("nan")), groups)


def _identity(rows: torch.Tensor) -> torch.Tensor:
    """Without data: uncorrelated inputs of mean 0 and variance 1."""
    return torch.ones(rows.shape[-1], dtype=torch.float64, device=rows.device)


def _report(
    found: Discovery,
    before: Sequence[tuple[int, int]],
    after: Sequence[tuple[int, int]],
    merges: Sequence[_Merge],
    method: str,
    key_method: str,
    itemsize: int,
) -> ConversionReport:
    changed = {one.of.attention.index: one for one in merges}
    plans = []
    for attention, (heads, groups) in zip(found.attentions, after, strict=True):
        one = changed.get(attention.index)
        members = tuple((head,) for head in range(groups)) if one is None else tuple(one.groups)
        losses = (0.0, 0.0) if one is None else (one.merged.key_loss, one.merged.value_loss)
        plans.append(LayerPlan(attention.index, heads, groups, attention.head_dim, members, *losses))
    return ConversionReport(
        tuple(before), tuple(after), method, key_method, "adjacent", None, tuple(plans), None,
        cache_bytes_of(found, before, itemsize), cache_bytes_of(found, after, itemsize),
    )  # fmt: skip
