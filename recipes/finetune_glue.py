"""Fine-tune a model on a GLUE task and evaluate it.

    accelerate launch recipes/finetune_glue.py --model_name_or_path bert-base-uncased --task_name cola \\
        --learning_rate 3e-5 --num_train_epochs 3 --per_device_train_batch_size 32 --output_dir outputs/cola

Loads any checkpoint of a supported family, also one that hf_attnkit changed. `--lora` trains adapters and merges
them; with `--load_in_8bit` or `--load_in_4bit` the base model is quantized and the adapters are what is saved. Writes
the model and results.json (one stage, "baseline": what the other recipes start from) into --output_dir; with --predict
also predictions/ in the form that the GLUE server takes.
"""

from __future__ import annotations

from transformers import TrainingArguments

from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import runs
from hf_attnkit.experiment.training.lora import LoraArguments, train_adapters
from hf_attnkit.experiment.training.quantized import QuantizationArguments, keep_trainable


def main() -> None:
    for parsed in runs(GlueArguments, LoraArguments, QuantizationArguments):
        finetune(*parsed)


def finetune(
    arguments: GlueArguments, lora: LoraArguments, quantization: QuantizationArguments, training: TrainingArguments
) -> None:
    """One run."""
    lora.check(training)
    quantization.check(lora, training)
    run = GlueRun(
        arguments, training, lora, quantization, needs_training_data=False, load_options=quantization.load_options()
    )
    keep_trainable(run.model)
    trained = train_adapters(run, lora, merge=not quantization.is_asked_for) if lora.lora else run.train()
    run.evaluate("baseline", **trained)
    run.finish(**(vars(lora) if lora.lora else {}), **(vars(quantization) if quantization.is_asked_for else {}))


if __name__ == "__main__":
    main()
