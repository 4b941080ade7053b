"""Export a task's model as an ONNX file that was compared with it, and measure the file on the task's dev set.

    python recipes/export.py --model_name_or_path outputs/cola-pruned --task_name cola --precision int8 \\
        --compare_with outputs/cola --output_dir outputs/cola-pruned-onnx --use_cpu

`--precision` is float32, float16 or int8. The stages are the model in PyTorch and the file in ONNX Runtime, by the
same metric code; `--compare_with` puts the untouched model before them. Their forward passes are timed alternately.

Writes model.onnx with its weights, config and tokenizer, results.json, the model card and the report into --output_dir.
What cannot be exported right is refused and leaves no file. `hf-attnkit export MODEL OUT` does the same without a task.
"""

from __future__ import annotations

from transformers import TrainingArguments

from hf_attnkit.experiment.exporting import ExportArguments, export_and_measure
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import run_each


def main() -> None:
    run_each(export, GlueArguments, ExportArguments, trains=False)


def export(arguments: GlueArguments, exporting: ExportArguments, training: TrainingArguments) -> None:
    """One run."""
    print(export_and_measure(GlueRun(arguments, training, exporting), exporting))


if __name__ == "__main__":
    main()
