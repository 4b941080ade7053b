"""Swap the attention of a fine-tuned model and recover it: evaluate, swap, evaluate, train, evaluate.

    accelerate launch recipes/swap_attention_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --attention sliding_window --attention_options window=64 --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-window

`--refit output` fits the output projections afterwards, and keeps the fit where it helps. `--attention` is a name, or
a JSON file that says it layer by layer: `{"0": "flash", "5": ["sliding_window", {"window": 64}]}`; layers that it
leaves out keep what they run. `--distill` trains towards the model as it was, and `--lora` trains adapters and merges
them. `linear` has to be trained. `--control` also trains the untouched model as long, for comparison.

Writes the recovered model, which `hf_attnkit.load_pretrained` loads, and results.json (stages "baseline", "changed",
"recovered") into --output_dir.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainingArguments

import hf_attnkit
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.swapping import SwapArguments, check, kinds_after, running, title
from hf_attnkit.experiment.sweep import run_each
from hf_attnkit.experiment.training.distill import DistillationArguments
from hf_attnkit.experiment.training.lora import LoraArguments
from hf_attnkit.experiment.training.uptrain import recover


def main() -> None:
    run_each(swap_and_recover, GlueArguments, SwapArguments, DistillationArguments, LoraArguments)


def swap_and_recover(
    arguments: GlueArguments,
    swapping: SwapArguments,
    distillation: DistillationArguments,
    lora: LoraArguments,
    training: TrainingArguments,
) -> None:
    """One run."""
    distillation.check(training)
    lora.check(training)
    run = GlueRun(arguments, training, swapping, distillation, lora)
    check(run.model, swapping, lora)
    # Before anything prepares the model: under autocast accelerate gives it a forward that a copy would share.
    teacher = copy.deepcopy(run.model) if distillation.distill else None
    run.model.to(training.device)
    run.evaluate("baseline")
    run.control(lambda: recover(run, None, distillation, lora))
    before, after = running(run.model), kinds_after(run.model, swapping)
    run.change(
        lambda: swap(run, swapping),
        kind="swap",
        title=title(before, after),
        facts={
            "attention": after,
            "attention_before": before,
            "attention_options": swapping.options,
            "refit": swapping.refit,
        },
    )
    run.evaluate("changed")
    if training.do_train:
        run.evaluate("recovered", **recover(run, teacher, distillation, lora))
    facts: dict[str, Any] = {"attention": running(run.model), "attention_options": swapping.options}
    for asked, flags in ((distillation.distill, distillation), (lora.lora, lora)):
        facts |= vars(flags) if asked else {}
    run.finish(**facts)


def swap(run: GlueRun, swapping: SwapArguments) -> None:
    """Swap the attention of the run's model, with the refit that is asked for."""
    fitting: dict[str, Any] = {}
    if swapping.refit != "none":
        batches = list(run.calibration_batches(swapping.num_calibrated))
        fitting = {"calibration": batches, "refit": swapping.refit}
    hf_attnkit.swap_attention(run.model, swapping.specification, **fitting)


if __name__ == "__main__":
    main()
