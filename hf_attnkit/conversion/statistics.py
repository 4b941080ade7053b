"""Second moments of each layer's attention input: what "pca" and predicted losses look at.

One matrix per layer, E[x x^T] with a 1 appended to x, summed in one streaming pass. Padding is left
out; products in float32 or better, sums in float64. No activations are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.conversion.checkpoints.safetensors_stream import Reader
from hf_attnkit.models.layers import AttentionLayer
from hf_attnkit.observing.batches import real_tokens, run_batches

_KEY = "layers.{}.second_moment"


@dataclass(frozen=True)
class Statistics:
    """
    Attributes:
        second_moments: per layer `(m + 1, m + 1)`, or the diagonal `(m + 1,)` of one that has nothing else; float64,
            the last entry is 1.
        num_tokens: how many tokens they are the mean of; `None` for the identity.
    """

    second_moments: list[Tensor]
    num_tokens: int | None

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `recipes/convert_checkpoint.py --statistics` reads."""
        tensors = {_KEY.format(i): moment.float().contiguous().cpu() for i, moment in enumerate(self.second_moments)}
        save_file(tensors, path, metadata={"num_tokens": str(self.num_tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else, or numbers that are not finite.
        """
        file = StatisticsFile(path)
        return cls([file.second_moment(index) for index in range(len(file.sizes))], file.num_tokens)


class StatisticsFile:
    """What `Statistics.save` wrote, read one layer at a time.

    Attributes:
        sizes: m + 1 per layer.
        num_tokens: as `Statistics`.

    Raises:
        ValueError: if the file holds something else.
        FileNotFoundError: if there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self._reader = Reader(path)
        entries, number = self._reader.entries, (self._reader.metadata or {}).get("num_tokens", "")
        found = [entries.get(_KEY.format(index)) for index in range(len(entries))]
        shapes = [entry.shape for entry in found if entry is not None and entry.dtype == "F32"]
        if not found or len(shapes) != len(found) or not number.isdigit() or any(
            len(shape) != 2 or shape[0] != shape[1] for shape in shapes
        ):  # fmt: skip
            raise ValueError(f"{path} holds no calibration statistics; write them with Statistics.save")
        self.sizes, self.num_tokens = [size for size, _ in shapes], int(number)

    def second_moment(self, index: int) -> Tensor:
        """A layer's matrix, float64.

        Raises:
            ValueError: for numbers that are not finite.
        """
        moment = self._reader.rows(_KEY.format(index))
        require_finite(moment, index)
        return moment.double()


def statistics_of(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    calibration: Iterable[Mapping[str, Any]] | Statistics | None,
) -> Statistics:
    """Those of the calibration: collected from batches, checked if given, the identity without.

    Raises:
        ValueError: as `collect`; for statistics of another model, or that are not finite.
    """
    if calibration is None:
        return identity(layers)
    if not isinstance(calibration, Statistics):
        return collect(model, layers, calibration)
    require_sizes(layers, [len(moment) for moment in calibration.second_moments])
    for index, moment in enumerate(calibration.second_moments):
        require_finite(moment, index)
    return calibration


def require_sizes(layers: Sequence[AttentionLayer], given: Sequence[int]) -> None:
    """Raise `ValueError` if statistics of these sizes are of another model."""
    sizes = [layer.key.in_features + 1 for layer in layers]
    if sizes != list(given):
        raise ValueError(
            f"the calibration statistics are of {len(given)} layers of sizes {sorted(set(given))}, the model has "
            f"{len(sizes)} of sizes {sorted(set(sizes))}; collect them with this model"
        )


def identity(layers: Sequence[AttentionLayer]) -> Statistics:
    """Without data: uncorrelated inputs of mean 0 and variance 1."""
    sizes = [layer.key.in_features + 1 for layer in layers]
    return Statistics([torch.ones(size, dtype=torch.float64) for size in sizes], None)


@plain_mode()
def collect(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Iterable[Mapping[str, Any]]
) -> Statistics:
    """Run `batches` through the model, in evaluation mode and without gradients.

    Raises:
        ValueError: for an empty iterable, a batch that is no mapping, or inputs that are not finite.
    """
    sums = [
        torch.zeros(2 * (layer.key.in_features + 1,), dtype=torch.float64, device=layer.key.weight.device)
        for layer in layers
    ]
    current: dict[str, Any] = {}

    def add(index: int, x: Tensor) -> None:
        chosen = real_tokens(x, current)
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        chosen = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], dim=1)
        sums[index] += chosen.T @ chosen

    def hook(index: int) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(index, args[0])

        return before

    handles = [layer.key.register_forward_pre_hook(hook(layer.index)) for layer in layers]
    try:
        for batch, run in run_batches(model, batches, description="calibration"):
            current = batch
            run()
    finally:
        for handle in handles:
            handle.remove()
    count = int(sums[0][-1, -1])
    for index, total in enumerate(sums):
        require_finite(total, index)
    return Statistics([(total / count).cpu() for total in sums], count)


def require_finite(moment: Tensor, index: int) -> None:
    """Raise `ValueError` naming the layer if a matrix has NaN or infinity."""
    if not moment.isfinite().all():
        raise ValueError(
            f"layer {index}: the calibration statistics contain NaN or infinity; run the model in bfloat16 or float32 "
            "and look for a batch that breaks it"
        )
