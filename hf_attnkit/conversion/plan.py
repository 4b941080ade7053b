"""`plan_gqa`: a conversion and what it would lose, computed before any weight is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention.consistency import require_consistent, require_unnamed_heads
from hf_attnkit.common.progress import progress_bar
from hf_attnkit.common.state import plain_mode
from hf_attnkit.conversion import budget as budgets
from hf_attnkit.conversion import heads
from hf_attnkit.conversion.heads import ABSENT, Heads
from hf_attnkit.conversion.merging import Merging, choose_merging
from hf_attnkit.conversion.methods.table import Merged, transforms
from hf_attnkit.conversion.owned_change import LayerMerge, OwnedChange, trial
from hf_attnkit.conversion.report import ConversionReport, LayerPlan, conversion_table, summary
from hf_attnkit.conversion.statistics import Statistics, statistics_of
from hf_attnkit.conversion.target_heads import check_budget, possible_targets, target_heads
from hf_attnkit.editing.fingerprint import Fingerprint
from hf_attnkit.editing.last_change import record_change
from hf_attnkit.models import known
from hf_attnkit.models.layers import AttentionLayer, projected_layers
from hf_attnkit.refitting.options import RefitOptions, listed, refit_options, require_no_stream
from hf_attnkit.refitting.refit import refit_layers
from hf_attnkit.refitting.report import RefitReport


@dataclass(frozen=True)
class _Work:
    """What `GQAPlan.apply` does; let go of afterwards, since it holds new weights, and the refit's batches."""

    change: OwnedChange
    made_for: Fingerprint | None
    heads_before: tuple[tuple[int, int], ...]
    batches: list[Mapping[str, Any]]
    refit: RefitOptions


@dataclass(eq=False)
class GQAPlan:
    """A conversion that was computed and not made: prints as a table, `apply` makes it.

    Attributes:
        method, key_method, grouping: how values and keys will be merged, and which of them.
        refit: what will be fitted after the merge: a word of `REFITS`.
        layers: one `LayerPlan` each.
        num_tokens: of the calibration that predicted losses look at; `None` without.
        bytes_before, bytes_after: of the key/value cache per token, all layers.
        report: what the conversion did, once it was made.
    """

    model: PreTrainedModel = field(repr=False)
    method: str
    key_method: str
    grouping: str
    refit: str
    layers: tuple[LayerPlan, ...]
    num_tokens: int | None
    bytes_before: int
    bytes_after: int
    _work: _Work | None = field(repr=False)
    report: ConversionReport | None = field(default=None, repr=False)

    @plain_mode()
    @known.looked_at_once()
    def apply(self) -> PreTrainedModel:
        """Make the conversion, refit included, and return the model. `report` then says what it did.

        Raises:
            ValueError: if the model is no longer the one that the plan was made for, naming what differs; if the plan
                was applied already; for calibration batches that do not run, or whose activations are not finite. The
                model is then unchanged.
            RuntimeError: if queries are not what their projection and the rotary embedding make them.
        """
        work = self._work
        if work is None:
            raise ValueError("the plan was applied already; make a new one")
        if work.made_for is not None:
            work.made_for.require_same(self.model)
        refit: RefitReport | None = None
        with work.change.made(thins=self.refit == "none") as made:
            if self.refit != "none":
                order = [[head for group in layer.groups for head in group] for layer in self.layers]
                layers = projected_layers(self.model)
                refit = refit_layers(self.model, layers, made, work.batches, work.refit, key_order=order)
        self._work = None
        self.report = ConversionReport(
            work.heads_before, tuple(work.change.heads), self.method, self.key_method, self.grouping, self.num_tokens,
            self.layers, refit, self.bytes_before, self.bytes_after,
        )  # fmt: skip
        record_change(self.model, self.report)
        return self.model

    def __str__(self) -> str:
        line = summary(self.method, self.key_method, self.num_tokens, self.bytes_before, self.bytes_after)
        return f"{conversion_table(self.layers)}\n{line}; refit: {self.refit}"


@plain_mode()
@known.looked_at_once()
def plan_gqa(
    model: PreTrainedModel,
    num_key_value_heads: int | Sequence[int] | None = None,
    *,
    method: str | None = None,
    calibration: Iterable[Mapping[str, Any]] | Statistics | None = None,
    refit: str | bool | RefitOptions | None = None,
    key_method: str | None = None,
    grouping: str | None = None,
    budget: float | None = None,
    uniform: bool = True,
) -> GQAPlan:
    """Compute a conversion to grouped-query attention and what it is predicted to lose. The model is not changed.

    `plan.apply()` makes the conversion, and `convert_to_gqa` does just that. Predicted losses are those of the merge;
    what the refit reaches is only known once it ran.

    Args:
        model, num_key_value_heads, method, calibration, refit, key_method, grouping, budget, uniform: as
            `convert_to_gqa`. Batches are kept until `apply` where there is a refit, which runs them again.

    Returns:
        The plan. It applies to this model as it is now: once weights, dtype, device, numbers of heads, attention or
        embeddings have changed, it refuses.

    Raises:
        TypeError, ValueError: as `convert_to_gqa`.
    """
    plan = planned(
        model, num_key_value_heads, method=method, calibration=calibration, refit=refit, key_method=key_method,
        grouping=grouping, budget=budget, uniform=uniform,
    )  # fmt: skip
    assert plan._work is not None
    plan._work = replace(plan._work, made_for=Fingerprint(model, projected_layers(model), projected_layers))
    return plan


def planned(
    model: PreTrainedModel,
    num_key_value_heads: int | Sequence[int] | None,
    *,
    method: str | None,
    calibration: Iterable[Mapping[str, Any]] | Statistics | None,
    refit: str | bool | RefitOptions | None,
    key_method: str | None,
    grouping: str | None,
    budget: float | None,
    uniform: bool,
) -> GQAPlan:
    """As `plan_gqa`, to be applied at once: it does not note what the model was when it was made."""
    layers = projected_layers(model)
    require_consistent(model, layers)
    require_unnamed_heads(layers)
    has_batches = calibration is not None and not isinstance(calibration, Statistics)
    given = "none" if calibration is None else "Statistics, which hold no activations"
    options = refit_options(refit, default="full", batches=has_batches, given=given)
    require_no_stream(options)
    merging = choose_merging(
        layers, method, key_method, grouping, calibrated=calibration is not None, has_batches=has_batches
    )
    if budget is not None and num_key_value_heads is not None:
        raise ValueError("give num_key_value_heads or budget, not both")
    if not isinstance(uniform, bool):
        raise ValueError(f"uniform={uniform!r} must be True or False")
    if not uniform and budget is None:
        raise ValueError("uniform=False spends a budget over the layers; give budget, or a list as num_key_value_heads")
    if budget is not None:
        check_budget(layers, budget)
    if budget is None or uniform:
        # Before a long calibration, so that a wrong number costs nothing.
        numbers = target_heads(layers, num_key_value_heads, budget, allow_same=merging.uses_statistics)
        merging.check_numbers(layers, numbers)
        if calibration is not None:
            trial(model, layers, numbers)
    batches: list[Mapping[str, Any]] = []
    if options.fits != "none" and calibration is not None and not isinstance(calibration, Statistics):
        calibration = batches = listed(calibration)
    statistics = statistics_of(model, layers, calibration)
    if budget is not None and not uniform:
        numbers = _spent(layers, merging, statistics, budget)
        merging.check_numbers(layers, numbers)
    merging.check_tokens(layers, numbers, statistics.num_tokens)

    merges: list[LayerMerge] = []
    planned = []
    for layer, number, moment in zip(
        progress_bar(layers, description=f"merging heads ({merging.method})", unit="layer"),
        numbers,
        statistics.second_moments,
        strict=True,
    ):
        if not merging.changes(layer, number):
            planned.append(_as_it_is(layer))
            continue
        merge, plan = _merged(layer, number, merging, statistics, moment)
        merges.append(merge)
        planned.append(plan)
    if not merges:
        reason = next((why for layer in layers for why in layer.problems.values()), "it has no output projection")
        raise ValueError(f"nothing would change: no layer's heads can get another basis ({layers[0].name}: {reason})")
    before, after = ([(layer.num_heads, layer.num_key_value_heads) for layer in part] for part in (layers, planned))
    bytes_before, bytes_after = (
        sum(n * (layer.head_dim + layer.value_head_dim) for layer, (_, n) in zip(layers, part, strict=True))
        * model.dtype.itemsize
        for part in (before, after)
    )
    work = _Work(OwnedChange(model, layers, merges), None, tuple(before), batches, options)
    return GQAPlan(
        model, merging.method, merging.key_method, merging.grouping, options.fits, tuple(planned),
        statistics.num_tokens, bytes_before, bytes_after, work,
    )  # fmt: skip


def _as_it_is(layer: AttentionLayer) -> LayerPlan:
    groups = tuple((head,) for head in range(layer.num_key_value_heads))
    return LayerPlan(layer.index, layer.num_heads, layer.num_key_value_heads, layer.head_dim, groups, 0.0, 0.0)


def _merged(
    layer: AttentionLayer, number: int, merging: Merging, statistics: Statistics, moment: Tensor
) -> tuple[LayerMerge, LayerPlan]:
    """A layer's merge into this number of heads; in a function of its own, since its heads in float64 are large."""
    present = statistics.with_others(layer.index, heads.read(layer))
    grouping = merging.groups(present, number, moment)
    groups = tuple(tuple(group) for group in grouping)
    merged = merging.merge(present, grouping, moment)
    losses = merged.key_loss, merged.value_loss
    plan = LayerPlan(layer.index, layer.num_heads, number, layer.head_dim, groups, *losses)
    return _merge(layer, merged, merging, groups), plan


def _merge(layer: AttentionLayer, merged: Merged, merging: Merging, groups: tuple[tuple[int, ...], ...]) -> LayerMerge:
    """The same without the queries and outputs that the methods leave as they are."""
    new, reordered = merged.heads, merging.grouping == "best"
    query = new.query if reordered or transforms(merging.key_method) else ABSENT
    output = new.output if reordered or transforms(merging.method) else ABSENT
    return LayerMerge(layer, _as_stored(layer, replace(new, query=query, output=output)), merged.constant, groups)


def _as_stored(layer: AttentionLayer, new: Heads) -> Heads:
    """The same in the dtype that they will be stored in, where that is one: float64 is four times bfloat16."""
    roles = {"query": layer.query, "key": layer.key, "value": layer.value, "output": layer.output}
    return replace(
        new,
        **{
            role: getattr(new, role).to(linear.weight.dtype)
            for role, linear in roles.items()
            if linear is not None
            and getattr(new, role).numel()
            and (linear.bias is None or linear.bias.dtype == linear.weight.dtype)
        },
    )


def _possible(layer: AttentionLayer) -> list[int]:
    """What a layer's number of key/value heads may become; as it is where its heads cannot be told."""
    return [layer.num_key_value_heads] if layer.problems else possible_targets([layer], allow_same=True)


def _spent(layers: Sequence[AttentionLayer], merging: Merging, statistics: Statistics, budget: float) -> list[int]:
    """A number of heads for each layer within a budget: few where few lose least."""
    bar = progress_bar(layers, description="losses", unit="layer")
    losses = [
        {layer.num_key_value_heads: 0.0}
        if layer.problems
        else {
            number: merging.loss(statistics.with_others(layer.index, heads.read(layer)), number, moment)
            for number in _possible(layer)
        }
        for layer, moment in zip(bar, statistics.second_moments, strict=True)
    ]
    return budgets.spend(losses, int(budget * sum(layer.num_key_value_heads for layer in layers) + 1e-9))
