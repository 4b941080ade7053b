"""What every recipe reads from its command line: its own arguments and Transformers' `TrainingArguments`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_attnkit.experiment.resume import with_value

ENTROPY_EVERY_N_STEPS = 100
LOGGING_STEPS = 0.02  # Trainer's own 500 leaves most of GLUE's trainings without a point of the loss's curve
EVAL_STEPS = 500  # Trainer's own is its logging_steps
_ONLY_BF16 = "converts the model itself to 16 bits, also for training and saving; --bf16 converts computations alone"
REFUSED = {
    "bf16_full_eval": _ONLY_BF16,
    "fp16_full_eval": _ONLY_BF16,
    "dataloader_drop_last": "leaves out rows of the dev and test data",
    "prediction_loss_only": "computes no metrics",
}


@dataclass
class RunArguments:
    """What every recipe that trains takes next to `TrainingArguments`."""

    dtype: str = field(
        default="float32",
        kw_only=True,
        metadata={
            "help": "Data type of the weights. Training with --bf16 keeps them in float32 and computes in 16 bits.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    entropy_every_n_steps: int | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Training steps between two logs of every layer's attention entropy; 0 for none. "
            f"{ENTROPY_EVERY_N_STEPS} by default."
        },
    )


@dataclass
class ChangeArguments:
    """What a recipe takes that changes a model and trains it."""

    control: bool = field(
        default=False,
        kw_only=True,
        metadata={
            "help": "Also train the untouched model as long (same data, seed and learning rate), for comparison with "
            "the recovered one."
        },
    )


def parse_arguments(
    *kinds: Any, argv: Sequence[str] | None = None, trains: bool = True, saves: bool = True
) -> tuple[Any, ...]:
    """Parse the command line into `kinds` and `TrainingArguments`; refuses what no recipe does.

    Without `--do_train`, `--do_eval` and `--predict` a recipe trains and measures; with `--do_train` or `--do_eval` it
    does only that. `--predict` is done in addition.

    Args:
        trains: whether the recipe can train; one that cannot evaluates.
        saves: whether the recipe ends with one model, which it saves.
    """
    argv = with_value(underscored(sys.argv[1:] if argv is None else argv))
    parser = HfArgumentParser((*kinds, TrainingArguments), allow_abbrev=False)
    parser.set_defaults(logging_steps=LOGGING_STEPS, eval_steps=EVAL_STEPS)
    *own, training = parser.parse_args_into_dataclasses(args=argv)
    if training.hub_token is not None:
        # Trainer pickles its arguments into every checkpoint and uploads them; the hub's library reads this, too.
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    # TrainingArguments sets do_eval by itself for --eval_strategy, so what the user asked for is read
    # from the flags alone.
    flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("--do_train", "--do_eval"):
        flags.add_argument(name, nargs="?", type=string_to_bool, const=True)
    asked, _ = flags.parse_known_args(argv)
    predicts = any(getattr(group, "predict", False) for group in own)
    if any(getattr(group, "only_predicts", False) for group in own):
        if asked.do_train or asked.do_eval or not predicts:
            parser.error("this task has nothing to train on or to measure: give --predict alone")
        asked.do_train = asked.do_eval = False
    if predicts and not saves:
        parser.error("--predict is for recipes that save a model, which this one does not: leave it out")
    if not trains:
        if asked.do_train or asked.do_eval is False:
            parser.error("this recipe evaluates and does not train: leave --do_train and --do_eval out")
        asked.do_train, asked.do_eval = False, True
    training.do_train = asked.do_train if asked.do_train is not None else not asked.do_eval
    training.do_eval = asked.do_eval if asked.do_eval is not None else not asked.do_train
    if not (training.do_train or training.do_eval or predicts):
        parser.error("--do_train False --do_eval False leaves nothing to do")
    if not (saves or training.do_eval):
        parser.error("this recipe compares what it measures: leave --do_train out, or add --do_eval")
    if training.do_predict:
        parser.error("--do_predict is not supported: recipes measure with --do_eval; those for GLUE have --predict")
    for name, why in REFUSED.items():
        if getattr(training, name, False):
            parser.error(f"--{name} {why}: leave it out")
    if not training.eval_do_concat_batches:
        parser.error("--eval_do_concat_batches False leaves the metrics without their inputs: leave it out")
    if not any(argument.split("=")[0] == "--output_dir" for argument in argv):
        parser.error("--output_dir is needed: the folder for results.json and the model")
    return *own, training


def underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with flags spelled one way; Transformers' parser takes `--do-eval` for `--do_eval`, too."""
    return [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]


def require_place(path: str) -> None:
    """Raise `FileNotFoundError` for a path that can only be a folder and is none; Transformers would name the hub."""
    if (Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise FileNotFoundError(
            f"--model_name_or_path {path} is no folder, nor a name on the hub, which has the form owner/name; name the "
            "folder of a saved model"
        )
