"""Cut heads out of any attention: rows by ownership, numbers by running, and proven against the zeroed model.

    owned rows of every parameter      query and key/value projections, fused in any order; biases; norms; sinks; gates
    columns of the output projection   wherever it lies
    numbers of heads                   the attributes (or config fields) that the module reads, see `head_numbers`
    proof                              the pruned model equals the uncut model with these heads zeroed, see `proof`

An attention that loses all of its heads keeps a stand-in, see `models.without_heads`.

Everything is undone if a step fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_attnkit.attention.kind import KEPT
from hf_attnkit.common.checks import in_range
from hf_attnkit.editing.alone import Alone
from hf_attnkit.editing.cut_parameters import cut_parameters, cut_shared
from hf_attnkit.editing.cut_plan import (
    CutPlan,
    parts_of_one_matrix,
    plan_cut,
    require_own_parameters,
    require_same_heads,
    uniform_configs,
)
from hf_attnkit.editing.head_numbers import Place, candidates, quantities, readable, recorded_reads, settle, unread
from hf_attnkit.editing.proof import Zeroed
from hf_attnkit.editing.stand_in import blank
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.attention import Attention, given_by_head
from hf_attnkit.models.discovery import Discovery, quiet
from hf_attnkit.models.known import transformers_attention
from hf_attnkit.models.owners import Ownership
from hf_attnkit.models.ownership import ownerships, signature
from hf_attnkit.models.without_heads import HEADS_LEFT


@dataclass
class CutHeads:
    """Heads that were cut, and how to bring them back.

    Attributes:
        heads: by the attention's index, `(query heads, key/value heads)` that it has now; (0, 0) where it lost all.
        numbers: by the attention's path, the attributes that were given other numbers (a list of them where one said
            how to split a matrix's output), and how many modules of a list are left.
        config: the fields of configs that the attention reads while it runs: config, name, number before and now.
        outputs: what the cut model puts out under the discovery's inputs.
    """

    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: list[tuple[PreTrainedConfig, str, int, int]] = field(default_factory=list)
    steps: Undo = field(default_factory=Undo, repr=False)
    outputs: list[Tensor] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the model back as it was."""
        self.steps.back_to()

    def undone(self) -> AbstractContextManager[None]:
        """The model as it was, while the block runs; then with the cut again, as it is now."""
        return self.steps.undone()

    def covers(self, module: nn.Module) -> bool:
        """Whether undoing brings back this module's old parameters."""
        return self.steps.covers(module)


def cut_heads(
    model: PreTrainedModel,
    removed: Mapping[int, Iterable[int]],
    discovery: Discovery,
    owned: Sequence[Ownership] | None = None,
    *,
    thins: bool = False,
) -> CutHeads:
    """Cut query heads, and the key/value heads that no query head is left for; in place.

    Args:
        removed: by the attention's index in `discovery`, the heads.
        discovery: of this model as it is, made under `known.transformers_attention`.
        owned: what belongs to heads, as of `ownerships(model, discovery.attentions)`.
        thins: whether of old parameters only what went is kept, see `undo`; for a cut that is not undone often.

    Raises:
        ValueError: for heads that are not there, groups that would be unequal, parameters that cannot be cut, an
            attention that does not run with fewer heads, or a model that then gives something else than the uncut one
            with these heads zeroed. The model is then unchanged.
    """
    attentions = discovery.attentions
    if owned is None:
        with transformers_attention(model):
            owned = ownerships(model, attentions)
    plans = [
        plan_cut(attentions[in_range(index, len(attentions), "attention")], owned[index], heads)
        for index, heads in removed.items()
    ]
    require_own_parameters(model, plans)
    cut = CutHeads(steps=Undo(thins=thins))
    try:
        cut_planned(model, plans, discovery, cut)
    except BaseException:
        cut.undo()
        raise
    return cut


def cut_planned(model: PreTrainedModel, plans: Sequence[CutPlan], discovery: Discovery, cut: CutHeads) -> None:
    """Cut what the plans say, find the numbers and prove the result; the caller undoes `cut` after an error.

    Raises:
        ValueError: as `cut_heads`, but for what its arguments say.
    """
    require_same_heads(plans, discovery.attentions)
    uniform = uniform_configs(plans, discovery.attentions)
    gone = {p.attention.index: p.gone for p in plans}
    paths = {p.attention.index: p.owned.output for p in plans}
    zeroed = Zeroed(model, [p.attention for p in plans], gone, discovery.inputs, paths)
    groups: dict[tuple[Any, ...], list[CutPlan]] = {}
    for plan in plans:
        groups.setdefault((signature(plan.attention), plan.heads, plan.key_value_heads), []).append(plan)
    with transformers_attention(model):  # under which the modules' inputs were noted
        before = [_Uncut(model, alike) for alike in groups.values()]
        for uncut in before:
            uncut.cut(cut.steps)
        cut_shared(model, plans, cut.steps)
        for uncut in before:
            _settle(model, uncut, uniform, cut)
    for plan in plans:
        if plan.empties:
            blank(model, plan, cut.steps)
            cut.heads[plan.attention.index] = 0, 0
    if problem := zeroed.difference():
        raise ValueError(f"{problem}; the model is unchanged")
    cut.outputs = zeroed.outputs


class _Uncut:
    """Attentions that are alike and lose the same heads: what the first gives and reads before it is cut."""

    def __init__(self, model: PreTrainedModel, alike: Sequence[CutPlan]) -> None:
        self.alike, self._model = alike, model
        plan = alike[0]
        self.alone = Alone(model, plan.attention, plan.owned)
        with quiet(model), recorded_reads(readable(plan.attention.module)) as reads:
            self.want = self.alone.heads()[list(plan.heads)]
        self.reads = list(reads.values())
        self.numbers: dict[str, tuple[int, int]] = {}
        self.parts = parts_of_one_matrix(plan)
        self.lists: dict[str, int] = {}

    def cut(self, undo: Undo) -> None:
        """Cut the parameters of all of them."""
        rows: set[tuple[int, int]] = set()
        for plan in self.alike:
            sizes, self.lists = cut_parameters(self._model, plan, undo)
            rows |= sizes
        plan = self.alike[0]
        head_sizes = plan.attention.head_dim, plan.attention.value_head_dim
        self.numbers = quantities(plan.before, plan.after, head_sizes, sorted(rows))


def _settle(model: PreTrainedModel, uncut: _Uncut, uniform: set[int], cut: CutHeads) -> None:
    """Find the numbers on the first of attentions that are alike, and give them to all."""
    alike, numbers, reads = uncut.alike, uncut.numbers, uncut.reads
    first = alike[0]
    attention = first.attention
    places = [(owner, name) for owner, name in reads if not isinstance(owner, PreTrainedConfig) or id(owner) in uniform]
    found = candidates(places, numbers, uncut.parts)
    old = {(id(owner), name): getattr(owner, name) for (owner, name), _ in found}

    def works() -> str:
        with quiet(model):
            return uncut.alone.difference(uncut.want, first.heads)

    try:
        chosen = settle(found, cut.steps, works)
    except ValueError as error:
        fields = sorted(
            {name for owner, name in reads if isinstance(owner, PreTrainedConfig) and id(owner) not in uniform}
        )
        values = [name for name in fields if _config_value(attention, name) in first.before]
        hint = (
            f". It reads the config's {', '.join(values)} while it runs, so all layers must lose the same heads"
            if values
            else ""
        )
        raise ValueError(
            f"{attention.path} does not run with fewer heads: {error}{hint}{_by_head_given(attention)}; the model is "
            "unchanged"
        ) from error
    inside = {id(module) for module in attention.module.modules()}
    for (owner, name), value in chosen:
        if id(owner) not in inside:
            cut.config.append((owner, name, old[id(owner), name], value))
    _follow(alike, chosen, unread(attention.module, reads, numbers), uncut.lists, cut)


def _by_head_given(attention: Attention) -> str:
    found = given_by_head(attention)
    return f". It is given something for each head by others: {', '.join(found)}" if found else ""


def _config_value(attention: Attention, name: str) -> Any:
    configs = [owner for owner in readable(attention.module) if isinstance(owner, PreTrainedConfig)]
    return next((getattr(config, name, None) for config in configs), None)


def _follow(
    alike: Sequence[CutPlan],
    chosen: Sequence[tuple[Place, Any]],
    others: Sequence[tuple[str, int]],
    lists: Mapping[str, int],
    cut: CutHeads,
) -> None:
    """Give all attentions that are alike the numbers found on the first."""
    first = alike[0].attention.module
    inside = {id(module): path for path, module in first.named_modules()}
    for plan in alike:
        module = plan.attention.module
        given: dict[str, Any] = dict(lists)
        for (owner, name), value in chosen:
            if id(owner) not in inside:
                continue
            target = module.get_submodule(inside[id(owner)])
            if getattr(target, name) != value:
                cut.steps.set(target, name, value)
            given[f"{inside[id(owner)]}.{name}".lstrip(".")] = value
        for name, value in others:
            cut.steps.set(module, name, value)
            given[name] = value
        cut.steps.set(module, HEADS_LEFT, plan.after[0])
        if KEPT in module.__dict__:  # learned by a kind that ran before, for the heads before
            cut.steps.drop(module, KEPT)
        cut.numbers[plan.attention.path] = given
        cut.heads[plan.attention.index] = plan.after
