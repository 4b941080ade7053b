"""Keep the rows of what stays, of any parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.editing.cut_plan import CutPlan
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.checkpoint_shapes import sizes_of


def cut_parameters(model: nn.Module, plan: CutPlan, undo: Undo) -> tuple[set[tuple[int, int]], dict[str, int]]:
    """Keep the rows of what stays.

    Returns:
        Sizes before and after along the cut dimensions; and by path in the module, how many modules of a list are left.
    """
    sizes: set[tuple[int, int]] = set()
    module, heads = plan.attention.module, plan.by_role()
    gone: dict[tuple[str, str], set[int]] = {}
    edits: list[tuple[nn.Module, str, int, Tensor]] = []
    for name, owners in plan.owned.owned.items():
        keep = owners.kept(heads)
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if not len(keep):
            gone.setdefault(_list_entry(module, name), set()).add(_position(name))
            continue
        if len(keep) < getattr(owner, leaf).shape[owners.dim]:
            edits.append((owner, leaf, owners.dim, keep))
    if len(plan.heads) < plan.attention.num_heads:
        assert plan.owned.output is not None
        output = model.get_submodule(plan.owned.output)
        size = plan.attention.value_head_dim
        columns = torch.cat([torch.arange(head * size, (head + 1) * size) for head in plan.heads])
        edits.append((output, "weight", 0 if isinstance(output, Conv1D) else 1, columns))
    for owner, leaf, dim, keep in edits:
        sizes.add((getattr(owner, leaf).shape[dim], len(keep)))
        _keep(owner, leaf, dim, keep, undo)
    for (path, name), positions in gone.items():
        owner = module.get_submodule(path)
        old = getattr(owner, name)
        undo.set(owner, name, nn.ModuleList(each for i, each in enumerate(old) if i not in positions))
    lists = {f"{path}.{name}".lstrip("."): len(getattr(module.get_submodule(path), name)) for path, name in gone}
    return sizes, lists


def cut_shared(model: nn.Module, plans: Sequence[CutPlan], undo: Undo) -> None:
    """Keep the rows of what stays in parameters that make something for the heads of several attentions, once each."""
    done: set[str] = set()
    for plan in plans:
        for name, owners in {} if plan.attention.bias is None else plan.attention.bias.rows.items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            keep = owners.kept(plan.by_role())
            if name not in done and len(keep) < getattr(owner, leaf).shape[owners.dim]:
                _keep(owner, leaf, owners.dim, keep, undo)
            done.add(name)


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
    with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
        new = old.detach().index_select(dim, keep.to(old.device)).contiguous()
        undo.set(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    shape = new.shape
    del old, new
    undo.thin(dim, keep)
    if leaf == "weight":
        names = sizes_of(owner)
        for name, size in zip(names, shape, strict=False):
            if type(vars(owner).get(name)) is int and vars(owner)[name] != size:
                undo.set(owner, name, size)
