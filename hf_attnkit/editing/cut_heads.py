"""Cut heads out of any attention: rows by ownership, numbers by running, and proven against the zeroed model.

    owned rows of every parameter      query and key/value projections, fused in any order; biases; norms; sinks; gates
    columns of the output projection   wherever it lies
    numbers of heads                   the attributes (or config fields) that the module reads, see `head_numbers`
    proof                              the pruned model equals the uncut model with these heads zeroed, see `proof`

Everything is undone if a step fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_attnkit.common.checks import in_range
from hf_attnkit.editing.alone import Alone
from hf_attnkit.editing.head_numbers import Place, candidates, quantities, readable, recorded_reads, settle, unread
from hf_attnkit.editing.proof import Zeroed
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.attention import Attention, given_by_head
from hf_attnkit.models.discovery import Discovery, quiet
from hf_attnkit.models.ownership import Ownership, ownerships, signature


@dataclass
class CutHeads:
    """Heads that were cut, and how to bring them back.

    Attributes:
        heads: by the attention's index, `(query heads, key/value heads)` that it has now.
        numbers: by the attention's path, the attributes that were given other numbers.
        config: the fields of configs that the attention reads while it runs, with their new numbers.
    """

    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    config: dict[str, int] = field(default_factory=dict)
    _undo: Undo = field(default_factory=Undo, repr=False)

    def undo(self) -> None:
        """Put the model back as it was."""
        self._undo.back_to()


@dataclass(frozen=True)
class _Plan:
    """What one attention keeps."""

    attention: Attention
    owned: Ownership
    heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]

    @property
    def before(self) -> tuple[int, int]:
        return self.attention.num_heads, self.owned.num_key_value_heads

    @property
    def after(self) -> tuple[int, int]:
        return len(self.heads), len(self.key_value_heads)

    def by_role(self) -> dict[str, list[int]]:
        """Heads that stay, as they arrive, by role."""
        keys = [i for i, number in enumerate(self.owned.key_heads) if number in self.key_value_heads]
        return {"query": list(self.heads), "output": list(self.heads), "key": keys, "value": keys}


def cut_heads(
    model: PreTrainedModel,
    removed: Mapping[int, Iterable[int]],
    discovery: Discovery,
    owned: Sequence[Ownership] | None = None,
) -> CutHeads:
    """Cut query heads, and the key/value heads that no query head is left for; in place.

    Args:
        removed: by the attention's index in `discovery`, the heads.
        discovery: of this model as it is.
        owned: what belongs to heads, as of `ownerships(model, discovery.attentions)`.

    Raises:
        ValueError: for heads that are not there, all heads of an attention, groups that would be unequal, parameters
            that cannot be cut, an attention that does not run with fewer heads, or a model that then gives something
            else than the uncut one with these heads zeroed. The model is then unchanged.
    """
    attentions = discovery.attentions
    owned = ownerships(model, attentions) if owned is None else owned
    plans = [
        plan_cut(attentions[in_range(index, len(attentions), "attention")], owned[index], heads)
        for index, heads in removed.items()
    ]
    require_own_parameters(model, plans)
    uniform = _uniform_configs(plans, attentions)
    gone = {p.attention.index: [h for h in range(p.before[0]) if h not in p.heads] for p in plans}
    paths = {p.attention.index: p.owned.output for p in plans}
    zeroed = Zeroed(model, [p.attention for p in plans], gone, discovery.inputs, paths)
    cut = CutHeads()
    try:
        groups: dict[tuple[Any, ...], list[_Plan]] = {}
        for plan in plans:
            groups.setdefault((signature(plan.attention), plan.heads, plan.key_value_heads), []).append(plan)
        for alike in groups.values():
            _cut_alike(model, alike, uniform, cut)
        if problem := zeroed.difference():
            raise ValueError(f"{problem}; the model is unchanged")
    except BaseException:
        cut.undo()
        raise
    return cut


def plan_cut(attention: Attention, owned: Ownership, removed: Iterable[int]) -> _Plan:
    """What an attention keeps.

    Raises:
        ValueError: as `cut_heads`.
    """
    name, number = attention.path, attention.num_heads
    gone = [in_range(head, number, "head", f"{name}: ") for head in removed]
    if len(set(gone)) != len(gone):
        raise ValueError(f"{name}: a head is named twice in {gone}")
    if owned.problem:
        raise ValueError(f"{name}: heads cannot be cut: {owned.problem}")
    if attention.calls_per_forward > 1:
        raise ValueError(f"{name}: it attends {attention.calls_per_forward} times in one forward pass")
    heads = tuple(head for head in range(number) if head not in gone)
    if not heads:
        raise ValueError(f"{name}: all {number} heads would go; leave one")
    sizes: dict[int, int] = {}
    for head in heads:
        key = owned.key_head_of(head, number)
        sizes[key] = sizes.get(key, 0) + 1
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{name}: {number} query heads share {owned.num_key_value_heads} key/value heads, and this selection would "
            f"leave groups of {[sizes.get(g, 0) for g in range(owned.num_key_value_heads)]}; remove whole groups, or "
            "the same number of heads from each group"
        )
    return _Plan(attention, owned, heads, tuple(sorted(sizes)))


def require_own_parameters(model: nn.Module, plans: Sequence[_Plan]) -> None:
    """Raise `ValueError` for a parameter that another module uses too, or that is made from others (pruned, normed)."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{path}.{name}")
    for plan in plans:
        path = plan.attention.path
        targets = [f"{path}.{name}" for name in plan.owned.owned] + [f"{plan.owned.output}.weight"]
        for target in targets:
            owner, _, leaf = target.rpartition(".")
            module = model.get_submodule(owner)
            if hasattr(module, "parametrizations") or ".parametrizations." in target or leaf.endswith("_orig"):
                raise ValueError(
                    f"{target} is made from other parameters (torch.nn.utils.prune, weight_norm or a parametrization); "
                    "make it permanent first (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
                )
            tensor = getattr(module, leaf)
            if len(sharing := users.get(id(tensor), [])) > 1:
                raise ValueError(
                    f"{target} is shared with {', '.join(name for name in sharing if name != target)}, which would be "
                    "changed too; give each its own copy first"
                )


def _uniform_configs(plans: Sequence[_Plan], attentions: Sequence[Attention]) -> set[int]:
    """Configs all of whose attentions are cut to the same numbers, so that they may change."""
    cuts = {plan.attention.index: (plan.before, plan.after) for plan in plans}
    by_config: dict[int, set[Any]] = {}
    for attention in attentions:
        for owner in readable(attention.module):
            if isinstance(owner, PreTrainedConfig):
                by_config.setdefault(id(owner), set()).add(cuts.get(attention.index))
    return {config for config, numbers in by_config.items() if len(numbers) == 1 and None not in numbers}


def _cut_alike(model: nn.Module, alike: Sequence[_Plan], uniform: set[int], cut: CutHeads) -> None:
    """Cut attentions that are alike to the same heads: the numbers are found on the first."""
    first = alike[0]
    attention = first.attention
    alone = Alone(model, attention, first.owned)
    with quiet(model), recorded_reads(readable(attention.module)) as reads:
        want = alone.heads()[list(first.heads)]
    rows: set[tuple[int, int]] = set()
    for plan in alike:
        rows |= _cut_parameters(model, plan, cut._undo)
    sizes = attention.head_dim, attention.value_head_dim
    numbers = quantities(first.before, first.after, sizes, sorted(rows))
    places = [
        place for place in reads.values() if not isinstance(place[0], PreTrainedConfig) or id(place[0]) in uniform
    ]
    found = candidates(places, numbers)

    def works() -> str:
        with quiet(model):
            return alone.difference(want)

    try:
        chosen = settle(found, cut._undo, works)
    except ValueError as error:
        fields = sorted(
            {name for owner, name in reads.values() if isinstance(owner, PreTrainedConfig) and id(owner) not in uniform}
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
    _follow(model, alike, chosen, unread(attention.module, reads.values(), numbers), cut)


def _by_head_given(attention: Attention) -> str:
    found = given_by_head(attention)
    return f". It is given something for each head by others: {', '.join(found)}" if found else ""


def _config_value(attention: Attention, name: str) -> Any:
    configs = [owner for owner in readable(attention.module) if isinstance(owner, PreTrainedConfig)]
    return next((getattr(config, name, None) for config in configs), None)


def _follow(
    model: nn.Module,
    alike: Sequence[_Plan],
    chosen: Sequence[tuple[Place, int]],
    others: Sequence[tuple[str, int]],
    cut: CutHeads,
) -> None:
    """Give all attentions that are alike the numbers found on the first."""
    first = alike[0].attention.module
    inside = {id(module): path for path, module in first.named_modules()}
    for plan in alike:
        module = plan.attention.module
        given: dict[str, int] = {}
        for (owner, name), value in chosen:
            if id(owner) not in inside:
                cut.config[name] = value
                continue
            target = module.get_submodule(inside[id(owner)])
            if getattr(target, name) != value:
                cut._undo.set(target, name, value)
            given[f"{inside[id(owner)]}.{name}".lstrip(".")] = value
        for name, value in others:
            cut._undo.set(module, name, value)
            given[name] = value
        cut.numbers[plan.attention.path] = given
        cut.heads[plan.attention.index] = plan.after


def _cut_parameters(model: nn.Module, plan: _Plan, undo: Undo) -> set[tuple[int, int]]:
    """Keep the rows of what stays; returns sizes before and after along the cut dimensions."""
    sizes: set[tuple[int, int]] = set()
    module, heads = plan.attention.module, plan.by_role()
    gone: dict[tuple[str, str], set[int]] = {}
    edits: list[tuple[nn.Module, str, int, Tensor]] = []
    for name, owners in plan.owned.owned.items():
        keep = owners.kept(heads)
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        tensor = getattr(owner, leaf)
        if not len(keep):
            gone.setdefault(_list_entry(module, name), set()).add(_position(name))
            continue
        if len(keep) < tensor.shape[owners.dim]:
            edits.append((owner, leaf, owners.dim, keep))
    assert plan.owned.output is not None
    output = model.get_submodule(plan.owned.output)
    size = plan.attention.value_head_dim
    columns = torch.cat([torch.arange(head * size, (head + 1) * size) for head in plan.heads])
    edits.append((output, "weight", 0 if isinstance(output, Conv1D) else 1, columns))
    for owner, leaf, dim, keep in edits:
        tensor = getattr(owner, leaf)
        sizes.add((tensor.shape[dim], len(keep)))
        _keep(owner, leaf, dim, keep, undo)
    for (path, name), positions in gone.items():
        owner = module.get_submodule(path)
        old = getattr(owner, name)
        undo.set(owner, name, nn.ModuleList(each for i, each in enumerate(old) if i not in positions))
    return sizes


def _list_entry(module: nn.Module, name: str) -> tuple[str, str]:
    """Path and name of the list of modules, one a head, that a head's own parameter is in.

    Raises:
        ValueError: if it is in none.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end].isdecimal() and isinstance(module.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end - 1]), parts[end - 1]
    raise ValueError(f"{name} belongs to the removed heads whole, and is in no list from which it could be taken")


def _position(name: str) -> int:
    return int(next(part for part in reversed(name.split(".")) if part.isdecimal()))


def _keep(owner: nn.Module, leaf: str, dim: int, keep: Tensor, undo: Undo) -> None:
    """Keep these rows of a parameter or buffer; device, dtype and `requires_grad` stay."""
    old = getattr(owner, leaf)
    new = old.detach().index_select(dim, keep.to(old.device)).contiguous()
    undo.set(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    if leaf == "weight":
        names = ("nx", "nf") if isinstance(owner, Conv1D) else ("out_features", "in_features")
        for name, size in zip(names, new.shape, strict=False):
            if type(vars(owner).get(name)) is int and vars(owner)[name] != size:
                undo.set(owner, name, size)
