"""Which heads of an attention stay, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_attnkit.common.checks import in_range
from hf_attnkit.editing.head_numbers import readable
from hf_attnkit.models.attention import Attention
from hf_attnkit.models.owners import Owners, Ownership


@dataclass(frozen=True)
class CutPlan:
    """What one attention keeps.

    Attributes:
        empties: whether all of its heads go; `heads` is then the one that stays as a stand-in, with weights of zero.
    """

    attention: Attention
    owned: Ownership
    heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    empties: bool = False

    @property
    def before(self) -> tuple[int, int]:
        return self.attention.num_heads, self.owned.num_key_value_heads

    @property
    def after(self) -> tuple[int, int]:
        return len(self.heads), len(self.key_value_heads)

    @property
    def gone(self) -> list[int]:
        """Heads that go."""
        return [head for head in range(self.attention.num_heads) if self.empties or head not in self.heads]

    def by_role(self) -> dict[str, list[int]]:
        """Heads that stay, as they arrive, by role."""
        keys = [i for i, number in enumerate(self.owned.key_heads) if number in self.key_value_heads]
        return {"query": list(self.heads), "output": list(self.heads), "key": keys, "value": keys}


def plan_cut(attention: Attention, owned: Ownership, removed: Iterable[int]) -> CutPlan:
    """What an attention keeps.

    Raises:
        ValueError: as `cut_heads`.
    """
    name, number = f"layer {attention.index} ({attention.path})", attention.num_heads
    gone = [in_range(head, number, "head", f"{name}: ") for head in removed]
    if len(set(gone)) != len(gone):
        raise ValueError(f"{name}: a head is named twice in {gone}")
    if owned.problem:
        raise ValueError(f"{name}: heads cannot be cut: {owned.problem}")
    if attention.calls_per_forward > 1:
        raise ValueError(f"{name}: it attends {attention.calls_per_forward} times in one forward pass")
    heads = tuple(head for head in range(number) if head not in gone)
    empties = not heads
    heads = heads or (0,)
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
    return CutPlan(attention, owned, heads, tuple(sorted(sizes)), empties)


def parameters_cut(model: nn.Module, plans: Sequence[CutPlan]) -> int:
    """How many parameters go."""
    number, shared = 0, {}
    for plan in plans:
        parameters, heads = dict(plan.attention.module.named_parameters()), plan.by_role()
        cut = [(parameters[name], own) for name, own in plan.owned.owned.items() if name in parameters]
        number += sum(_cut_from(parameter, own, heads) for parameter, own in cut)
        if plan.owned.output is not None:
            features = model.get_submodule(plan.owned.output).weight.numel() // plan.attention.num_heads  # type: ignore[operator]
            number += features * (plan.attention.num_heads - len(plan.heads))
        for name, own in {} if plan.attention.bias is None else plan.attention.bias.rows.items():
            shared[name] = _cut_from(model.get_parameter(name), own, heads)
    return number + sum(shared.values())


def _cut_from(parameter: nn.Parameter, owners: Owners, heads: dict[str, list[int]]) -> int:
    size = parameter.shape[owners.dim]
    return parameter.numel() // size * (size - len(owners.kept(heads)))


def require_own_parameters(model: nn.Module, plans: Sequence[CutPlan]) -> None:
    """Raise `ValueError` for a parameter that another module uses too, or that is made from others (pruned, normed)."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{path}.{name}")
    for plan in plans:
        path = plan.attention.path
        targets = [f"{path}.{name}" for name in plan.owned.owned]
        targets += [] if plan.owned.output is None else [f"{plan.owned.output}.weight"]
        targets += [] if plan.attention.bias is None else list(plan.attention.bias.rows)
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


def require_same_heads(plans: Sequence[CutPlan], attentions: Sequence[Attention]) -> None:
    """Raise `ValueError` where attentions that take one bias, head by head, would lose different heads."""
    kept = {plan.attention.index: plan.heads for plan in plans}
    for plan in plans:
        bias = plan.attention.bias
        if bias is None or bias.problem:
            continue
        if any(kept.get(user, tuple(range(plan.attention.num_heads))) != plan.heads for user in bias.users):
            others = ", ".join(attentions[user].path for user in bias.users)
            raise ValueError(
                f"{plan.attention.path}: {bias.name} makes a bias of the scores for each head, which is one for "
                f"several attentions: {others}. Remove the same heads from all: {dict.fromkeys(bias.users, plan.gone)}"
            )


def parts_of_one_matrix(plan: CutPlan) -> tuple[list[int], list[int]]:
    """Sizes of query, key and value, before and after, of a matrix that makes them one after the other; else empty."""
    for name, owners in plan.owned.reached.items():
        rows = {role: each for role, each in owners.rows.items() if role in ("query", "key", "value")}
        if not name.endswith("weight") or len(rows) < 2 or not all(each.any() for each in rows.values()):
            continue
        used = {role: each.any(0).nonzero()[:, 0] for role, each in rows.items()}
        order = sorted(used, key=lambda role: int(used[role][0]))
        if any(int(used[role][-1]) - int(used[role][0]) + 1 != len(used[role]) for role in order):
            continue
        heads = plan.by_role()
        before, after = (
            [len(used[role]) for role in order],
            [int(rows[role][heads[role]].any(0).sum()) for role in order],
        )
        if before != after:
            return before, after
    return [], []


def uniform_configs(plans: Sequence[CutPlan], attentions: Sequence[Attention]) -> set[int]:
    """Configs all of whose attentions are cut to the same numbers, so that they may change."""
    cuts = {plan.attention.index: (plan.before, plan.after) for plan in plans}
    by_config: dict[int, set[Any]] = {}
    for attention in attentions:
        for owner in readable(attention.module):
            if isinstance(owner, PreTrainedConfig):
                by_config.setdefault(id(owner), set()).add(cuts.get(attention.index))
    return {config for config, numbers in by_config.items() if len(numbers) == 1 and None not in numbers}
