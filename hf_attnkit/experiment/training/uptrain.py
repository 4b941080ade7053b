"""Convert to grouped-query attention and recover: what the uptraining recipes do with their `Run`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.conversion import METHODS
from hf_attnkit.conversion.grouping import GROUPINGS
from hf_attnkit.conversion.merging import choose_merging
from hf_attnkit.conversion.methods.table import uses_statistics
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.conversion.target_heads import target_heads
from hf_attnkit.experiment.arguments import ChangeArguments
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.training.distill import DistillationArguments, DistillationTrainer
from hf_attnkit.experiment.training.lora import LoraArguments, train_adapters
from hf_attnkit.models.layers import editable_layers


@dataclass
class ConversionArguments(ChangeArguments):
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value heads per layer; default: at most a quarter of the query heads."}
    )
    method: str = field(default="pca", metadata={"help": "How heads are merged.", "choices": list(METHODS)})
    key_method: str | None = field(
        default=None, metadata={"help": "Another method for the keys.", "choices": list(METHODS)}
    )
    grouping: str = field(
        default="adjacent", metadata={"help": "Which heads are merged together.", "choices": list(GROUPINGS)}
    )
    refit: bool = field(default=True, metadata={"help": "Refit queries and outputs after the merge."})

    def names(self) -> dict[str, Any]:
        """The method's arguments of `convert_to_gqa`."""
        return {"method": self.method, "key_method": self.key_method, "grouping": self.grouping}


def convert(run: Run, arguments: ConversionArguments, number: int, calibration_size: int) -> None:
    """Convert the run's model, with so much training data for calibration (sentences or tokens; 0 for none)."""
    calibration: Iterable[Mapping[str, Any]] | hf_attnkit.conversion.Statistics | None = None
    if calibration_size:
        calibration = list(run.calibration_batches(calibration_size))
        if not arguments.refit:
            used = (uses_statistics(name) for name in (arguments.method, arguments.key_method) if name)
            looks = any(used) or arguments.grouping == "best"
            calibration = collect(run.model, editable_layers(run.model), calibration) if looks else None
    hf_attnkit.convert_to_gqa(run.model, number, calibration=calibration, **arguments.names())


def recover(
    run: Run, teacher: PreTrainedModel | None, distillation: DistillationArguments, lora: LoraArguments
) -> dict[str, Any]:
    """Train the run's model, towards the teacher if there is one; returns what `Run.train` returns."""
    options: dict[str, Any] = {}
    if teacher is not None:
        options = {
            "kind": DistillationTrainer,
            "teacher": teacher,
            "weight": distillation.distill_weight,
            "temperature": distillation.distill_temperature,
            "attention_weight": distillation.distill_attention_weight,
        }
    return train_adapters(run, lora, **options) if lora.lora else run.train(**options)


def title(model: PreTrainedModel, number: int) -> str:
    """What the conversion does, in a phrase."""
    before = sorted({layer.num_key_value_heads for layer in editable_layers(model)})
    span = " to ".join(map(str, dict.fromkeys((before[0], before[-1]))))
    return f"{span} key/value heads merged into {number}"


def check(conversion: ConversionArguments, run: Run) -> int:
    """The number of key/value heads. Called before the first evaluation, which may take long, to refuse early.

    Raises:
        ValueError: a number or method that does not fit the model.
    """
    layers = editable_layers(run.model)
    [number, *_] = target_heads(layers, conversion.num_key_value_heads)
    choose_merging(layers, conversion.method, conversion.key_method, conversion.grouping, calibrated=False)
    return number


def uptrain(
    run: Run,
    conversion: ConversionArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    *,
    calibration: tuple[str, int],
) -> None:
    """Evaluate, convert, evaluate, train, evaluate, save.

    Args:
        calibration: what its size is called in results.json, and the size.
    """
    number = check(conversion, run)
    # Before anything prepares the model: under autocast accelerate gives it a forward that a copy would share.
    teacher = copy.deepcopy(run.model) if distillation.distill else None
    run.model.to(run.training.device)
    run.evaluate("baseline")
    run.control(lambda: recover(run, None, distillation, lora))
    refit = conversion.refit and calibration[1] > 0
    run.change(
        lambda: convert(run, conversion, number, calibration[1]),
        kind="conversion",
        title=title(run.model, number),
        facts={"num_key_value_heads": number, **conversion.names(), "refit": refit},
    )
    run.evaluate("changed")
    if run.training.do_train:
        run.evaluate("recovered", **recover(run, teacher, distillation, lora))
    facts: dict[str, Any] = {**conversion.names(), "refit": refit}
    facts[calibration[0]] = calibration[1]
    for asked, flags in ((distillation.distill, distillation), (lora.lora, lora)):
        facts |= vars(flags) if asked else {}
    run.finish(**facts)
