"""Second moments of each layer's attention input: what "pca" and predicted losses look at.

One matrix per layer, E[x x^T] with a 1 appended to x, summed in one streaming pass. Padding is left
out; products in float32 or better, sums in float64. No activations are kept. x is what the key
projection gets; where queries or values are of another input (cross-attention), theirs is a matrix more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attnkit.common.state import plain_mode
from hf_attnkit.conversion.checkpoints.safetensors_stream import Reader
from hf_attnkit.conversion.heads import Heads
from hf_attnkit.models.layers import AttentionLayer, weight_of
from hf_attnkit.observing.batches import real_tokens, run_batches

_KEY = "layers.{}.second_moment"
_OTHER = "layers.{}.{}"


@dataclass(frozen=True)
class Statistics:
    """
    Attributes:
        second_moments: per layer `(m + 1, m + 1)`, or the diagonal `(m + 1,)` of one that has nothing else; float64,
            the last entry is 1.
        num_tokens: how many tokens they are the mean of, the fewest of any layer; `None` for the identity.
        others: by the layer's number and "query" or "value", those of projections that take another input.
    """

    second_moments: list[Tensor]
    num_tokens: int | None
    others: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def with_others(self, index: int, heads: Heads) -> Heads:
        """A layer's heads with the second moments of the inputs that are not the keys'."""
        query, value = (self.others.get((index, role)) for role in ("query", "value"))
        return replace(heads, query_moment=query, value_moment=value)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `recipes/convert_checkpoint.py --statistics` reads."""
        named = {_KEY.format(i): moment for i, moment in enumerate(self.second_moments)}
        named |= {_OTHER.format(*key): moment for key, moment in self.others.items()}
        tensors = {name: moment.float().contiguous().cpu() for name, moment in named.items()}
        save_file(tensors, path, metadata={"num_tokens": str(self.num_tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else, or numbers that are not finite.
        """
        file = StatisticsFile(path)
        moments = [file.second_moment(index) for index in range(len(file.sizes))]
        others = {(index, role): moment for index in range(len(moments)) for role in ("query", "value")
                  if (moment := file.other(index, role)) is not None}  # fmt: skip
        return cls(moments, file.num_tokens, others)


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
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there is no file of calibration statistics at {str(path)!r}; write one with Statistics.save or "
                "recipes/collect_statistics.py"
            )
        self._reader = Reader(path)
        entries, number = self._reader.entries, (self._reader.metadata or {}).get("num_tokens", "")
        count = sum(name.endswith(".second_moment") for name in entries)
        found = [entries.get(_KEY.format(index)) for index in range(count)]
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

    def other(self, index: int, role: str) -> Tensor | None:
        """That of a layer's "query" or "value" projection, where its input is another one than the keys'.

        Raises:
            ValueError: for numbers that are not finite.
        """
        if (name := _OTHER.format(index, role)) not in self._reader.entries:
            return None
        moment = self._reader.rows(name)
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
    for layer in layers:
        for role in layer.other_inputs:
            given = calibration.others.get((layer.index, role))
            if given is None or len(given) != _size(layer, role):
                raise ValueError(
                    f"the calibration statistics have no second moment of the {role} projection's input of "
                    f"{layer.name}, which is another one than the keys'; collect them with this model"
                )
            require_finite(given, layer.index)
    return calibration


def require_sizes(layers: Sequence[AttentionLayer], given: Sequence[int]) -> None:
    """Raise `ValueError` if statistics of these sizes are of another model."""
    sizes = [_size(layer, "key") for layer in layers]
    if sizes != list(given):
        raise ValueError(
            f"the calibration statistics are of {len(given)} layers of sizes {sorted(set(given))}, the model has "
            f"{len(sizes)} of sizes {sorted(set(sizes))}; collect them with this model"
        )


def _size(layer: AttentionLayer, role: str) -> int:
    """Size of a projection's second moment; that of the 1 alone where there is no projection."""
    linear = getattr(layer, role)
    return 1 if linear is None else weight_of(linear).shape[1] + 1


def identity(layers: Sequence[AttentionLayer]) -> Statistics:
    """Without data: uncorrelated inputs of mean 0 and variance 1."""
    moments = [torch.ones(_size(layer, "key"), dtype=torch.float64) for layer in layers]
    others = {(layer.index, role): torch.ones(_size(layer, role), dtype=torch.float64)
              for layer in layers for role in layer.other_inputs}  # fmt: skip
    return Statistics(moments, None, others)


@plain_mode()
def collect(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], batches: Iterable[Mapping[str, Any]]
) -> Statistics:
    """Run `batches` through the model, in evaluation mode and without gradients.

    Raises:
        ValueError: for an empty iterable, a batch that is no mapping, inputs that are not finite, or a layer that no
            batch reaches.
    """
    sums = {
        (layer.index, role): torch.zeros(
            2 * (_size(layer, role),), dtype=torch.float64, device=getattr(layer, role).weight.device
        )
        for layer in layers
        for role in ("key", *sorted(layer.other_inputs))
        if getattr(layer, role) is not None
    }
    current: dict[str, Any] = {}

    def hook(layer: AttentionLayer, role: str) -> Any:
        padding = layer.padding if role == "query" else layer.key_padding

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            chosen = real_tokens(args[0], current, padding, layer.of_length)
            chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
            chosen = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], dim=1)
            sums[layer.index, role] += chosen.T @ chosen

        return before

    by_index = {layer.index: layer for layer in layers}
    handles = [
        getattr(by_index[index], role).register_forward_pre_hook(hook(by_index[index], role)) for index, role in sums
    ]
    try:
        for batch, run in run_batches(model, batches, description="calibration"):
            current = batch
            run()
    finally:
        for handle in handles:
            handle.remove()
    for (index, role), total in sums.items():
        require_finite(total, index)
        if not total[-1, -1]:
            raise ValueError(
                f"{by_index[index].name}: no calibration batch reaches its {role} projection; give batches with the "
                "inputs that it attends to"
            )
    counts = [int(total[-1, -1]) for total in sums.values()]
    moments = {key: (total / total[-1, -1]).cpu() for key, total in sums.items()}
    nothing = torch.ones(1, dtype=torch.float64)
    return Statistics(
        [moments.get((layer.index, "key"), nothing) for layer in layers],
        min(counts, default=0),
        {key: moment for key, moment in moments.items() if key[1] != "key"},
    )


def require_finite(moment: Tensor, index: int) -> None:
    """Raise `ValueError` naming the layer if a matrix has NaN or infinity."""
    if not moment.isfinite().all():
        raise ValueError(
            f"layer {index}: the calibration statistics contain NaN or infinity; run the model in bfloat16 or float32 "
            "and look for a batch that breaks it"
        )
