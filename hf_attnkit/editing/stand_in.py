"""The one head of zeros that an attention keeps when it loses all of its heads; see `models.without_heads`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attnkit.editing.cut_plan import CutPlan
from hf_attnkit.editing.undo import Undo
from hf_attnkit.models.attention_layer import weight_of
from hf_attnkit.models.without_heads import HEADS_LEFT


def blank(model: nn.Module, plan: CutPlan, undo: Undo) -> None:
    """Make the head that was left one of zeros.

    Its columns of the output projection are zero, and its rows of what makes queries, keys and values, so that neither
    gets a gradient. The bias of the output projection stays.
    """
    module, heads = plan.attention.module, plan.by_role()
    for name, reached in plan.owned.reached.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        rows = torch.stack([reached.rows[role][heads[role]].any(0) for role in reached.rows]).any(0)
        owned = plan.owned.owned.get(name)
        if owned is not None and owned.dim == reached.dim:  # as many as were left
            rows = rows[owned.kept(heads)]
        if rows.any():
            _zero(owner, leaf, reached.dim, rows.nonzero()[:, 0], undo)
    assert plan.owned.output is not None
    output = model.get_submodule(plan.owned.output)
    dim = 0 if isinstance(output, Conv1D) else 1
    _zero(output, "weight", dim, torch.arange(weight_of(output).shape[1]), undo)
    undo.set(module, HEADS_LEFT, 0)


def _zero(owner: nn.Module, leaf: str, dim: int, rows: Tensor, undo: Undo) -> None:
    old = getattr(owner, leaf)
    with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
        new = old.detach().index_fill(dim, rows.to(old.device), 0.0)
        undo.set(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
