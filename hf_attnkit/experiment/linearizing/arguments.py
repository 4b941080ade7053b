"""What a linearisation is on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import PreTrainedModel, TrainingArguments

import hf_attnkit
from hf_attnkit.attention import swap
from hf_attnkit.attention.kernels.feature_maps import FEATURE_MAPS
from hf_attnkit.attention.kind import ATTRIBUTE, Kind, Stock
from hf_attnkit.attention.kinds.linear import LinearAttention
from hf_attnkit.attention.kinds.sliding_window import SlidingWindowAttention
from hf_attnkit.common.checks import choice
from hf_attnkit.common.options import changed
from hf_attnkit.experiment.arguments import ChangeArguments
from hf_attnkit.experiment.linearizing.running import swap_quietly
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.models.layers import attention_layers

FEATURE_MAP = "exponential"
CHOICES = ("kl", "uniform")
REFITS = ("output", "scale", "none")


@dataclass
class LinearizeArguments(ChangeArguments):
    feature_map: str = field(
        default=FEATURE_MAP, metadata={"help": "What replaces the exponential.", "choices": list(FEATURE_MAPS)}
    )
    window: int | None = field(
        default=None, metadata={"help": "Keys next to a query that keep their softmax terms; none by default."}
    )
    gate: bool = field(
        default=False, metadata={"help": "Learn how much the window counts against what is beyond it; needs --window."}
    )
    decay: bool = field(default=False, metadata={"help": "Learn how fast each head forgets."})
    window_alone: bool = field(
        default=False,
        metadata={
            "help": "Leave the linear attention out and train the window alone: what linear attention has to beat."
        },
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the layers to linearise; by default all that can be."}
    )
    softmax_layers: int = field(default=0, metadata={"help": "How many of these layers keep softmax attention."})
    choose: str = field(
        default="kl",
        metadata={
            "help": "Which these are: 'kl', the layers that cost most when linear alone, or 'uniform', spread evenly.",
            "choices": list(CHOICES),
        },
    )
    transfer_epochs: float = field(
        default=2.0, metadata={"help": "Passes over the training data that learn the features; 0 leaves it out."}
    )
    transfer_learning_rate: float = field(default=1e-2, metadata={"help": "Adam's, at the start of these passes."})
    refit: str = field(
        default="output",
        metadata={"help": f"What is fitted in closed form after them, one of {', '.join(REFITS)}.", "choices": REFITS},
    )

    def __post_init__(self) -> None:
        choice(self.choose, "--choose", CHOICES)
        choice(self.refit, "--refit", REFITS)
        if self.softmax_layers < 0:
            raise ValueError(f"--softmax_layers {self.softmax_layers} must be at least 0")
        if not (self.transfer_epochs >= 0 and math.isfinite(self.transfer_epochs)):
            raise ValueError(f"--transfer_epochs {self.transfer_epochs} must be at least 0 and finite; 0 leaves it out")
        if not (self.transfer_learning_rate > 0 and math.isfinite(self.transfer_learning_rate)):
            raise ValueError(
                f"--transfer_learning_rate {self.transfer_learning_rate} must be a finite number above 0; "
                "--transfer_epochs 0 leaves the transfer out"
            )
        if self.choose != "kl" and not self.softmax_layers:
            raise ValueError(f"--choose {self.choose} has no effect without --softmax_layers, how many it chooses")
        if self.window_alone:
            self.refuse_given("with --window_alone, which has no features", "feature_map", "gate", "decay")
            if self.window is None:
                raise ValueError("--window_alone needs --window, the number of keys that it leaves a query")
        learns = self.learns  # which makes the kind, and so checks its options with one another
        if not self.transfer_epochs:
            self.refuse_given("with --transfer_epochs 0; leave one out", "transfer_learning_rate")
        elif not learns:
            what = "--window_alone" if self.window_alone else f"--feature_map {self.feature_map}"
            self.refuse_given(f"with {what}, which has nothing to learn", "transfer_epochs", "transfer_learning_rate")

    def refuse_given(self, why: str, *names: str) -> None:
        """Raise `ValueError` for the first of these options that is not at its default."""
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"--{name} has no effect {why}")

    @property
    def kind(self) -> Kind:
        """What the layers will run."""
        if self.window_alone:
            return SlidingWindowAttention(window=self.window)  # type: ignore[arg-type] # checked
        gate, decay = ("learned" if asked else None for asked in (self.gate, self.decay))
        return LinearAttention(self.feature_map, self.window, decay=decay, gate=gate)

    @property
    def has_branches(self) -> bool:
        """Whether the kind has both a window and what is beyond it."""
        return self.window is not None and not self.window_alone

    @property
    def calibrated(self) -> list[str]:
        """The options that look at training data and cannot do without."""
        chosen = ["--choose kl"] if self.softmax_layers > 0 and self.choose == "kl" else []
        return ([] if self.refit == "none" else [f"--refit {self.refit}"]) + chosen

    @property
    def learns(self) -> bool:
        """Whether the kind has features to learn."""
        return self.kind.create_parameters(1, 1, 2) is not None


def candidates(model: PreTrainedModel, arguments: LinearizeArguments) -> list[int]:
    """The layers that are linearised or chosen among, in order. Called before anything is measured.

    Raises:
        ValueError: options or layers that do not fit the model, a model that runs swapped attention, or more softmax
            layers than there are layers to linearise.
    """
    layers = attention_layers(model)
    running = [getattr(layer.module, ATTRIBUTE, None) for layer in layers]
    if any(kind is not None and not isinstance(kind, Stock) for kind in running):
        raise ValueError(
            "the model runs swapped attention already, and the features are learned from its softmax attention; start "
            "from the model as it was, or call hf_attnkit.restore_attention and save it"
        )
    kind = arguments.kind
    found = sorted(swap.check(model, kind.name, layers=arguments.layers, **changed(kind)))
    if arguments.softmax_layers >= len(found):
        raise ValueError(
            f"--softmax_layers {arguments.softmax_layers} leaves none of {len(found)} layers linear; give at most "
            f"{len(found) - 1}"
        )
    # What a model's masks and scores do to it shows in its proof alone.
    swap_quietly(model, kind, found)
    hf_attnkit.restore_attention(model)
    return found


@dataclass
class LinearizeDistillationArguments(DistillationArguments):
    distill: bool = field(default=True, metadata={"help": "Train towards the model as it was before the change."})


def check(
    arguments: LinearizeArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    training: TrainingArguments,
    *,
    calibration: str,
    epochs: float,
    longest: tuple[str, int],
) -> None:
    """Refuse arguments that have no effect together.

    Args:
        calibration: the option that says how many sentences or tokens the KL, the refit and the branches look at.
        epochs: of all trainings but the features'.
        longest: the option that bounds a row, and its tokens.

    Raises:
        ValueError: see the messages.
    """
    if not (training.num_train_epochs >= 0 and math.isfinite(training.num_train_epochs)):
        raise ValueError(
            f"--num_train_epochs {training.num_train_epochs} must be at least 0 and finite; 0 leaves this training out"
        )
    if arguments.window is not None and arguments.window >= longest[1]:
        raise ValueError(
            f"--window {arguments.window} covers every row of --{longest[0]} {longest[1]}, which is softmax attention: "
            f"linear attention would never run; give at most {longest[1] - 1}, or a longer --{longest[0]}"
        )
    if training.do_train:
        distillation.check(training)
    lora.check(training)
    _refuse_untrained(arguments, distillation, lora, training, epochs)
    size = getattr(arguments, calibration)
    if arguments.calibrated and not size:
        raise ValueError(
            f"{' and '.join(arguments.calibrated)} look at training data, and there is none for calibration; give some"
        )
    if size and not (arguments.calibrated or (arguments.has_branches and training.do_eval)):
        arguments.refuse_given(
            "without a refit, layers chosen by KL, or branches to measure; leave it out", calibration
        )


def _refuse_untrained(
    arguments: LinearizeArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    training: TrainingArguments,
    epochs: float,
) -> None:
    """Refuse what only a training that is left out would read."""
    if not training.do_train:  # 0 epochs say what is so
        given = [name for name in ("transfer_epochs", "transfer_learning_rate") if getattr(arguments, name)]
        arguments.refuse_given("without training; add --do_train, or leave it out", *given)
    elif epochs:
        return
    why = "with 0 epochs the features alone are trained" if training.do_train else "nothing is trained"
    default = vars(LinearizeDistillationArguments())
    asked = {name: distillation.distill and value != default[name] for name, value in vars(distillation).items()}
    if training.do_train:
        asked |= {"lora": lora.lora, "control": arguments.control, "max_steps": training.max_steps > 0}
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"--{name} has no effect: {why}; leave it out")
