"""Read off the gradients of a run which parameters' rows belong to which head."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_attnkit.models.attention import Attention, by_head, is_linear
from hf_attnkit.models.owners import Owners, Ownership, owners_of
from hf_attnkit.models.random_run import RandomRun


def owned_rows(run: RandomRun) -> Ownership:
    attention, coupled = run.attention, {}
    roles = dict(run.heads)
    if run.taken is None or run.output is None:
        if attention.output is None:
            coupled["output projection"] = (
                "no matrix product takes the attention's output, nor one that depends on it head by head"
            )
    else:
        slices = _slices(run.taken, attention)
        if slices is None or not _is_head_by_head(run, slices):
            coupled[run.output] = (
                "it takes a mixture of the heads: something between the attention and it (a norm over all heads, "
                "another order) makes each of its inputs depend on several"
            )
        else:
            roles["output"] = slices
    touched: dict[str, dict[str, list[list[Tensor]]]] = {}
    for role, heads in roles.items():
        _touched(heads, run, functools.partial(_note, touched, role, len(heads)))
    buffers = {name for name, _ in run.module.named_buffers()}
    owned: dict[str, Owners] = {}
    shared: list[str] = []
    by_role: dict[str, dict[str, Owners | str | None]] = {role: {} for role in roles}
    for name, roles_of in touched.items():
        parts: dict[str, Owners] = {}
        for role, by_dim in roles_of.items():
            one = owners_of(role, by_dim)
            by_role[role][name] = one
            if isinstance(one, str):
                coupled[name] = one
            elif one is not None:
                parts[role] = one
        if name in coupled:
            continue
        if not parts:
            if name not in buffers:
                shared.append(name)
            continue
        try:
            owned[name] = functools.reduce(Owners.joined, parts.values())
        except ValueError as error:
            coupled[name] = str(error)
    coupled |= _mixed(run, roles, by_role, owned)
    key_heads = _key_heads(roles, by_role, attention, coupled)
    matrices = frozenset(name for name in owned if run.leaves[name].dim() > 1)
    return Ownership(owned, tuple(shared), coupled, key_heads, run.output, matrices, _reached(run, touched))


def _reached(run: RandomRun, touched: dict[str, dict[str, list[list[Tensor]]]]) -> dict[str, Owners]:
    """See `Ownership`."""
    found = {}
    for name, by_role in touched.items():
        module = run.module.get_submodule(name.rpartition(".")[0])
        if is_linear(module):
            dim = 1 if isinstance(module, Conv1D) and run.leaves[name].dim() > 1 else 0
            rows = {role: torch.stack([head[dim] for head in heads]).cpu() for role, heads in by_role.items()}
            found[name] = Owners(dim, rows)
    return found


def _touched(heads: Tensor, run: RandomRun, seen: Callable[[str, int, list[Tensor]], None]) -> None:
    """Tell `seen` which entries of each parameter each head's random combination depends on."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(heads.shape[1:], generator=generator, dtype=heads.dtype).to(heads.device)
    if not heads.requires_grad:
        return
    for head in range(len(heads)):
        for name, entries in run.touched((heads[head] * weights).sum()).items():
            seen(name, head, entries)


def _note(
    touched: dict[str, dict[str, list[list[Tensor]]]], role: str, count: int, name: str, head: int, rows: list[Tensor]
) -> None:
    """Keep them, by parameter, role and head."""
    tables = touched.setdefault(name, {})
    if role not in tables:
        tables[role] = [[torch.zeros_like(r) for r in rows] for _ in range(count)]
    tables[role][head] = rows


def _slices(taken: Tensor, attention: Attention) -> Tensor | None:
    """What the output projection takes, by head: `(heads, batch, positions, size)`."""
    if taken.shape[-1] != attention.num_heads * attention.value_head_dim:
        return None
    return by_head(taken, attention.value_head_dim)


def _is_head_by_head(run: RandomRun, slices: Tensor) -> bool:
    """Whether slice h of what the output projection takes depends on the output of head h and no other."""
    if run.attended is None:
        return True  # a module that never calls the interface: its parameters tell
    for head in range(len(slices)):
        if not slices.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(slices[head].sum(), [run.attended], retain_graph=True, allow_unused=True)
        if gradient is None:
            return False
        heads = (gradient != 0).any(-1).flatten(0, 1).any(0)
        if not heads[head] or heads.sum() != 1:
            return False
    return True


def _mixed(
    run: RandomRun,
    roles: dict[str, Tensor],
    by_role: dict[str, dict[str, Owners | str | None]],
    owned: dict[str, Owners],
) -> dict[str, str]:
    """Matrices of which each head takes everything, though heads of that role have parameters of their own.

    Keys that all heads share (multi-query) are made by a matrix without owners too, but then nothing else has any.
    """
    found: dict[str, str] = {}
    for role, heads in roles.items():
        if len(heads) < 2:
            continue
        parts = by_role[role]
        matrices = [n for n, one in parts.items() if isinstance(one, Owners) and run.leaves[n].dim() > 1]
        vectors = [n for n, one in parts.items() if isinstance(one, Owners) and run.leaves[n].dim() == 1]
        whole = [n for n, one in parts.items() if one is None and run.leaves[n].dim() > 1]
        if not matrices and whole and (vectors or role == "query"):
            why = f"every {role} head depends on all of it"
            if vectors:
                why += f", through a norm over all heads together or the like ({', '.join(vectors)})"
            found[whole[-1]] = why
    return found


def _key_heads(
    roles: dict[str, Tensor],
    by_role: dict[str, dict[str, Owners | str | None]],
    attention: Attention,
    coupled: dict[str, str],
) -> tuple[int, ...]:
    """For each key head, as it arrives, the head whose parameters make it; see `Ownership`."""
    if not attention.calls_interface:
        # What is shared within groups: the coarsest partition that owned rows have.
        groups = [one.partition() for one in by_role.get("output", {}).values() if isinstance(one, Owners)]
        coarse = [group for group in groups if group is not None]
        return min(coarse, key=max, default=tuple(range(attention.num_heads)))
    number = len(roles["key"])
    partitions = set()
    for role in ("key", "value"):
        parts = [one for one in by_role[role].values() if isinstance(one, Owners)]
        if parts:
            fine = [group for group in (one.partition() for one in parts) if group is not None]
            partitions.add(max(fine, key=max, default=tuple(range(number))))
        else:
            partitions.add((0,) * number)
    if len(partitions) > 1:
        coupled.setdefault("keys and values", f"they are shared among heads differently: {sorted(partitions)}")
    return max(partitions, key=max)
