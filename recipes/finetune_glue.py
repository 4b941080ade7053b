"""Fine-tune a model on a GLUE task and evaluate it.

    accelerate launch recipes/finetune_glue.py --model_name_or_path bert-base-uncased --task_name cola \\
        --learning_rate 3e-5 --num_train_epochs 3 --per_device_train_batch_size 32 --output_dir outputs/cola

Loads any checkpoint of a supported family, also one that hf_attnkit changed. Writes the model and results.json (one
stage, "baseline": what the other recipes start from) into --output_dir; with --predict also predictions/ in the form
that the GLUE server takes.
"""

from __future__ import annotations

from glue_run import GlueArguments, GlueRun
from sweep import runs
from transformers import TrainingArguments


def main() -> None:
    for arguments, training in runs(GlueArguments):
        finetune(arguments, training)


def finetune(arguments: GlueArguments, training: TrainingArguments) -> None:
    """One run."""
    run = GlueRun(arguments, training, needs_training_data=False)
    trained = run.train()
    run.evaluate("baseline", **trained)
    run.finish()


if __name__ == "__main__":
    main()
