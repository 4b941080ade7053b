"""Fine-tune a model on a GLUE task and evaluate it.

    accelerate launch recipes/finetune_glue.py --model_name_or_path bert-base-uncased --task_name cola \\
        --learning_rate 3e-5 --num_train_epochs 3 --per_device_train_batch_size 32 --output_dir outputs/cola

Loads any checkpoint of a supported model, also one that hf_attnkit changed. `--lora` trains adapters and merges them;
with `--load_in_8bit` or `--load_in_4bit` the base model is quantized and the adapters are saved. `--do_eval` alone
measures the model as it is.

Writes the model and results.json (one stage, "fine-tuned", or "baseline" without training) into --output_dir; with
--predict also predictions/ in the form that the GLUE server takes.
"""

from __future__ import annotations

from transformers import TrainingArguments

from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import run_each
from hf_attnkit.experiment.training.lora import LoraArguments, train_adapters
from hf_attnkit.experiment.training.quantized import QuantizationArguments, keep_trainable


def main() -> None:
    run_each(finetune, GlueArguments, LoraArguments, QuantizationArguments)


def finetune(
    arguments: GlueArguments, lora: LoraArguments, quantization: QuantizationArguments, training: TrainingArguments
) -> None:
    """One run."""
    lora.check(training)
    quantization.check(lora, training)
    run = GlueRun(arguments, training, lora, quantization, load_options=quantization.load_options())
    keep_trainable(run.model)
    trained = train_adapters(run, lora, merge=not quantization.is_asked_for) if lora.lora else run.train()
    run.evaluate("fine-tuned" if training.do_train else "baseline", **trained)
    run.finish(**(vars(lora) if lora.lora else {}), **(vars(quantization) if quantization.is_asked_for else {}))


if __name__ == "__main__":
    main()
