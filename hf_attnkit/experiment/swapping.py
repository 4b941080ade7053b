"""What a swap of attention is on the command line: which kind each layer gets, checked before anything is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.attention import swap
from hf_attnkit.attention.kind import Kind
from hf_attnkit.common.checks import choice
from hf_attnkit.experiment.arguments import ChangeArguments
from hf_attnkit.experiment.pruning import parse_options
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.models.layers import AttentionLayer, attention_layers, projected_layers
from hf_attnkit.refitting.swap_attention import FITS


@dataclass
class SwapArguments(ChangeArguments):
    attention: str = field(
        metadata={"help": f"One of {', '.join(hf_attnkit.available_attentions())}, or a .json file of layers."}
    )
    attention_options: list[str] = field(
        default_factory=list, metadata={"help": "Its options, such as window=64 num_sink_tokens=4."}
    )

    refit: str = field(
        default="none",
        metadata={
            "help": f"What is fitted in closed form after the swap, one of {', '.join(FITS)}; kept where it helps.",
            "choices": list(FITS),
        },
    )
    calibration_samples: int | None = field(
        default=None, metadata={"help": "Training sentences that a refit looks at. By default 512."}
    )

    @property
    def reads_training_data(self) -> bool:
        """Whether training sentences are needed without training, too."""
        return self.refit != "none"

    def __post_init__(self) -> None:
        choice(self.refit, "--refit", FITS)
        if self.calibration_samples is not None and self.refit == "none":
            raise ValueError(f"--calibration_samples {self.calibration_samples} has no effect with --refit none")
        self.num_calibrated = 512 if self.calibration_samples is None else self.calibration_samples
        if self.num_calibrated < 1:
            raise ValueError(f"--calibration_samples {self.calibration_samples} must be at least 1")
        self.options: dict[Any, Any] = parse_options(self.attention_options, "--attention_options")
        self.specification: Any = (self.attention, self.options)
        if self.attention.endswith(".json"):
            if self.options:
                raise ValueError(
                    f"--attention_options {' '.join(self.attention_options)} has no effect with --attention "
                    f"{self.attention}; write [name, options] in the file"
                )
            self.specification = read_mapping(Path(self.attention))
            self.options = {layer: spec[1] for layer, spec in self.specification.items() if isinstance(spec, tuple)}


def read_mapping(path: Path) -> dict[int, str | tuple[str, dict[str, Any]]]:
    """The layers of a JSON file, as `swap_attention` takes them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not `{"layer": name or [name, options]}`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--attention {path} does not exist; give a JSON file, or a name without .json")
    form = 'must be JSON such as {"0": "flash", "5": ["sliding_window", {"window": 64}]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {int(layer): tuple(spec) if isinstance(spec, list) else spec for layer, spec in content.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--attention {path} {form} ({error})") from error
    for layer, spec in found.items():
        pair = isinstance(spec, tuple) and [type(part) for part in spec] == [str, dict]
        if not (pair or isinstance(spec, str)):
            raise ValueError(f"--attention {path}, layer {layer}: {spec!r} {form}")
    return found


def check(model: PreTrainedModel, arguments: SwapArguments, lora: LoraArguments) -> None:
    """Refuse what cannot be done before the first evaluation, which may take long.

    Raises:
        ValueError: an attention or option that does not fit the model, or adapters that would leave it untrained.
    """
    kinds = swap.check(model, arguments.specification)
    if lora.lora:
        layers = projected_layers(model)  # refuses a model that cannot have adapters
        learning = [index for index, kind in kinds.items() if _learns(kind, layers[index])]
        if learning:
            raise ValueError(
                f"--lora trains adapters of the projections, and the features that layers {learning} learn would stay "
                "as they start; leave --lora out"
            )


def _learns(kind: Kind, layer: AttentionLayer) -> bool:
    return kind.create_parameters(layer.num_heads, layer.num_key_value_heads, layer.head_dim) is not None


def running(model: PreTrainedModel) -> list[str]:
    """The attention of each layer, by name."""
    return [swap.saved_kind(model, layer.index) for layer in attention_layers(model)]


def kinds_after(model: PreTrainedModel, arguments: SwapArguments) -> list[str]:
    """The same after the swap."""
    kinds = swap.check(model, arguments.specification)
    return [kinds[i].name if i in kinds else name for i, name in enumerate(running(model))]


def title(before: list[str], after: list[str]) -> str:
    """What the swap does, in a phrase."""
    swapped = [kind for kind, old in zip(after, before, strict=True) if kind != old]
    which = "" if len(swapped) == len(after) else f" in {len(swapped)} of {len(after)} layers"
    return f"{' and '.join(dict.fromkeys(swapped)) or after[0]} attention{which if swapped else ''}"
