"""Learn features: each layer's linear attention towards what softmax attention gives there (LoLCATs, Zhang et al. 2024,
arXiv 2410.10254).

The model runs with softmax attention, so every layer sees what it sees in the untouched model, and next to it each
linear layer computes its own output from the same queries, keys and values. What is made small is the mean over layers
of

    |W_o (linear - softmax)|^2 / |W_o softmax|^2

over real tokens: the error of what attention adds to the residual stream, 0 for equal and 1 for putting out nothing.
Only the features learn. No labels are read, no second model is in memory, and no layer waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_attnkit.attention.kind import ATTRIBUTE, NO_CALL, PARAMETERS, Call, Kind
from hf_attnkit.attention.kinds.gqa import GroupedQueryAttention
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.mask import Mask
from hf_attnkit.experiment.linearizing.running import layers_of, running
from hf_attnkit.experiment.training.train import LOSS
from hf_attnkit.models.layers import weight_of
from hf_attnkit.observing.batches import spare_options

Note = Callable[[Tensor, Tensor, Mask], None]


@dataclass(frozen=True)
class Softmax(Kind):
    """Softmax attention that also tells what linear attention gives.

    Attributes:
        linear: the other.
        note: is given the output of both, `(B, H, Q, D)`, first the linear one, and the mask.
    """

    name = "softmax of a transfer"
    takes_documents = True
    self_attention_only = True

    linear: LinearAttention
    note: Note

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
        """As `Kind.attention`."""
        with torch.no_grad():
            target, _ = GroupedQueryAttention().attention(query, key, value, mask.as_matrix(), scaling=scaling)
        alone = replace(call, cache=None)
        output, _ = self.linear.attention(query, key, value, mask, scaling=scaling, dropout=dropout, call=alone)
        self.note(output, target, mask)
        return target, None


def relative_error(output: Tensor, target: Tensor, mask: Mask, projection: nn.Linear | None) -> Tensor:
    """The loss of a layer, see above.

    Args:
        output, target: `(B, H, Q, D)`.
        projection: W_o; `None` compares what it would take.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    parts = [x.to(wide).transpose(1, 2).flatten(2) for x in (output - target, target)]
    if projection is not None:
        weight = weight_of(projection).detach().to(wide)
        parts = [x @ weight.T for x in parts]
    if mask.key_visible is not None:
        real = mask.key_visible.expand(len(target), -1)[:, -target.shape[2] :]
        parts = [x * real[..., None] for x in parts]
    error, energy = (x.square().sum() for x in parts)
    return error / energy.clamp(min=torch.finfo(wide).tiny)


class TransferTrainer(Trainer):
    """A `Trainer` of a swapped model that trains only what its linear layers learn; logs every layer's loss, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers = [each for each in layers_of(self.model, LinearAttention) if hasattr(each.module, PARAMETERS)]
        if not self.layers:
            raise ValueError("no layer runs linear attention with features to learn: swap some to it first")
        self.model.requires_grad_(False)
        for layer in self.layers:
            getattr(layer.module, PARAMETERS).requires_grad_(True)
        # The loss of a batch is a ratio: batches that are accumulated count alike, whatever their tokens.
        self.model_accepts_loss_kwargs = False
        self._spared = spare_options(self.model)
        self._losses: dict[int, list[Tensor]] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`; afterwards every parameter of the model may train again."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.model.requires_grad_(True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over layers."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found: dict[int, list[Tensor]] = {}  # of each call: ALBERT calls one layer several times

        def noting(index: int, projection: nn.Linear | None) -> Note:
            def note(output: Tensor, target: Tensor, mask: Mask) -> None:
                found.setdefault(index, []).append(relative_error(output, target, mask, projection))

            return note

        kinds = {
            layer.module: Softmax(getattr(layer.module, ATTRIBUTE), noting(layer.index, layer.output))
            for layer in self.layers
        }

        def with_total(module: nn.Module, args: Any, output: Any) -> tuple[Tensor, Any]:
            return torch.stack([torch.stack(calls).mean() for calls in found.values()]).mean(), output

        # Part of what the model puts out: DistributedDataParallel looks there for what is trained.
        hook = self.model.register_forward_hook(with_total)
        model.eval()  # targets without dropout
        try:
            with running(kinds), self.compute_loss_context_manager():
                unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
                total, outputs = model(**unlabelled, **self._spared)
        finally:
            hook.remove()
            model.train()
        for index, calls in found.items():
            self._losses.setdefault(index, []).append(torch.stack(calls).mean().detach())
        return (total, outputs) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`; after a loss, the mean of each layer's since the one before."""
        super().log(logs, start_time)
        if "loss" in logs and self._losses:
            means = {f"{LOSS}/layer_{i}": float(torch.stack(each).mean()) for i, each in sorted(self._losses.items())}
            self._losses = {}
            super().log(means, start_time)
