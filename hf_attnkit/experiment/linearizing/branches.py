"""What each branch of linear attention with a window contributes: a hybrid may score well and leave one of them unused.

(arXiv 2510.05901 found converted models that run on their window alone.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnkit.attention.kind import ATTRIBUTE, NO_CALL, Call
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.common.state import evaluation_mode
from hf_attnkit.experiment.linearizing.running import layers_of, running
from hf_attnkit.observing.batches import to_device

BRANCHES = ("both", "window", "linear")


def branch_scores(model: PreTrainedModel, measure: Callable[[], float]) -> dict[str, float]:
    """What `measure` gives with both branches, with the window alone, and with linear attention alone.

    The other branch's terms are left out of a query's sum and of its normaliser. Empty for a model that has no layer
    with both.
    """
    layers = [layer for layer in layers_of(model, LinearAttention) if getattr(layer.module, ATTRIBUTE).window]
    if not layers:
        return {}
    found = {}
    for name in BRANCHES:
        with running({each.module: replace(getattr(each.module, ATTRIBUTE), branches=name) for each in layers}):
            found[name] = measure()
    return found


def linear_shares(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """For each layer with both branches the linear one's share of the output's energy, 0 to 1.

    |far|^2 / (|near|^2 + |far|^2), summed over heads and real tokens, of what each adds to the output; 0 where neither
    adds anything, as in a layer without heads.
    """
    energies: dict[int, Tensor] = {}
    kinds = {}
    for layer in layers_of(model, LinearAttention):
        kind = getattr(layer.module, ATTRIBUTE)
        if kind.window:
            energies[layer.index] = torch.zeros(2, dtype=torch.float64)
            fields = {name: getattr(kind, name) for name in ("feature_map", "window", "decay", "gate", "branches")}
            kinds[layer.module] = _Weighed(**fields, energy=energies[layer.index])
    with torch.no_grad(), evaluation_mode(model), running(kinds):
        for batch in batches:
            model(**to_device(batch, model))
    return {index: float(far / (near + far)) if near + far else 0.0 for index, (near, far) in energies.items()}


@dataclass(frozen=True)
class _Weighed(LinearAttention):
    """Linear attention that adds up the energies of its branches.

    Attributes:
        energy: `(2,)`, float64: the window's and what is beyond it.
    """

    energy: Tensor | None = None

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        scaling: float,
        dropout: float = 0.0,
        call: Call = NO_CALL,
    ) -> tuple[Tensor, None]:
        """As `LinearAttention`."""
        near, far = self.parts(query, key, value, mask, scaling=scaling, call=replace(call, cache=None))
        real = None if mask.key_visible is None else mask.key_visible[:, None, -query.shape[2] :, None]
        for place, part in enumerate((near, far)):
            counted = part if real is None else part * real
            assert self.energy is not None
            self.energy[place] += counted.double().square().sum().cpu()
        return (near + far).to(query.dtype), None
