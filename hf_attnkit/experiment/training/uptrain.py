"""Convert to grouped-query attention and recover: what the uptraining recipes do with their `Run`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

import hf_attnkit
from hf_attnkit.common.checks import choice
from hf_attnkit.conversion import METHODS
from hf_attnkit.conversion.grouping import GROUPINGS
from hf_attnkit.conversion.merging import choose_merging
from hf_attnkit.conversion.target_heads import target_heads
from hf_attnkit.experiment.arguments import ChangeArguments
from hf_attnkit.experiment.run import Run
from hf_attnkit.experiment.training.distill import DistillationArguments, DistillationTrainer
from hf_attnkit.experiment.training.lora import LoraArguments, train_adapters
from hf_attnkit.models.layers import projected_layers
from hf_attnkit.refitting.options import REFITS, refit_options


@dataclass
class ConversionArguments(ChangeArguments):
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value heads per layer; default: at most a quarter of the query heads."}
    )
    method: str | None = field(
        default=None,
        metadata={"help": "How heads are merged; default: pca with calibration, else mean.", "choices": list(METHODS)},
    )
    key_method: str | None = field(
        default=None, metadata={"help": "Another method for the keys.", "choices": list(METHODS)}
    )
    grouping: str | None = field(
        default=None,
        metadata={
            "help": "Which heads are merged together; default: best for pca with calibration, else adjacent.",
            "choices": list(GROUPINGS),
        },
    )
    refit: str | None = field(
        default=None,
        metadata={
            "help": f"What is fitted to the model before, one of {', '.join(REFITS)}; default: full with calibration."
        },
    )

    def __post_init__(self) -> None:
        spelled = {"true": "full", "false": "none"}.get(str(self.refit).lower(), self.refit)  # as flags used to be
        self.refit = None if spelled is None else choice(spelled, "--refit", REFITS)

    def names(self) -> dict[str, Any]:
        """The method's arguments of `convert_to_gqa`."""
        return {"method": self.method, "key_method": self.key_method, "grouping": self.grouping}


def convert(run: Run, arguments: ConversionArguments, number: int, calibration_size: int) -> None:
    """Convert the run's model, with so much training data for calibration (sentences or tokens; 0 for none)."""
    batches = list(run.calibration_batches(calibration_size)) if calibration_size else None
    hf_attnkit.convert_to_gqa(run.model, number, calibration=batches, refit=arguments.refit, **arguments.names())


def recover(
    run: Run,
    teacher: PreTrainedModel | None,
    distillation: DistillationArguments,
    lora: LoraArguments,
    **options: Any,
) -> dict[str, Any]:
    """Train the run's model, towards the teacher if there is one; returns what `Run.train` returns.

    Args:
        options: other ones of `Run.train`.
    """
    if teacher is not None:
        options |= {
            "kind": DistillationTrainer,
            "teacher": teacher,
            "weight": distillation.distill_weight,
            "temperature": distillation.distill_temperature,
            "attention_weight": distillation.distill_attention_weight,
        }
    return train_adapters(run, lora, **options) if lora.lora else run.train(**options)


def title(model: PreTrainedModel, number: int) -> str:
    """What the conversion does, in a phrase."""
    before = sorted({layer.num_key_value_heads for layer in projected_layers(model)})
    span = " to ".join(map(str, dict.fromkeys((before[0], before[-1]))))
    return f"{span} key/value heads merged into {number}"


def check(conversion: ConversionArguments, run: Run, calibration_size: int) -> tuple[int, dict[str, str]]:
    """The number of key/value heads, and what the conversion's defaults mean here.

    Called before the first evaluation, which may take long, to refuse early.

    Raises:
        ValueError: a number or method that does not fit the model.
    """
    layers, calibrated = projected_layers(run.model), calibration_size > 0
    [number, *_] = target_heads(layers, conversion.num_key_value_heads)
    merging = choose_merging(layers, **conversion.names(), calibrated=calibrated, has_batches=calibrated)
    refit = refit_options(conversion.refit, default="full", batches=calibrated).fits
    names = {"method": merging.method, "key_method": merging.key_method, "grouping": merging.grouping, "refit": refit}
    return number, names


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
    number, names = check(conversion, run, calibration[1])
    # Before anything prepares the model: under autocast accelerate gives it a forward that a copy would share.
    teacher = copy.deepcopy(run.model) if distillation.distill else None
    run.model.to(run.training.device)
    run.evaluate("baseline")
    run.control(lambda: recover(run, None, distillation, lora))
    run.change(
        lambda: convert(run, conversion, number, calibration[1]),
        kind="conversion",
        title=title(run.model, number),
        facts={"num_key_value_heads": number, **names},
    )
    run.evaluate("changed")
    if run.training.do_train:
        run.evaluate("recovered", **recover(run, teacher, distillation, lora))
    facts: dict[str, Any] = dict(names)
    facts[calibration[0]] = calibration[1]
    for asked, flags in ((distillation.distill, distillation), (lora.lora, lora)):
        facts |= vars(flags) if asked else {}
    run.finish(**facts)
