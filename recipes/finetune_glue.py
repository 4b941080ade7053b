"""Fine-tune a model on a GLUE task and evaluate it.

    accelerate launch recipes/finetune_glue.py --model_name_or_path bert-base-uncased --task_name cola \\
        --learning_rate 3e-5 --num_train_epochs 3 --per_device_train_batch_size 32 --output_dir outputs/cola

Loads any checkpoint of a supported family, also one that hf_attnkit changed. Writes the model and results.json (one
stage, "baseline": what the other recipes start from) into --output_dir.
"""

from __future__ import annotations

from base_run import parse_arguments
from glue_run import GlueArguments, GlueRun


def main() -> None:
    arguments, training = parse_arguments(GlueArguments)
    run = GlueRun(arguments, training)
    trained = run.train()
    run.evaluate("baseline", **trained)
    run.finish()


if __name__ == "__main__":
    main()
