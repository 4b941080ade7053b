"""Convert a fine-tuned model to grouped-query attention and recover it: evaluate, convert, evaluate, train, evaluate.

    accelerate launch recipes/uptrain_gqa_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --num_key_value_heads 3 --method pca --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-gqa

`pca` and the refit of the output projections look at training sentences first (`--calibration_samples`);
neither uses labels. `--method mean --refit false` is mean-pooling as published, the baseline.

Writes the recovered model and results.json (stages "baseline", "changed", "recovered") into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from glue_run import GlueArguments, GlueRun, parse_arguments

import hf_attnkit
from hf_attnkit.conversion import METHODS, targets
from hf_attnkit.conversion.grouping import GROUPINGS
from hf_attnkit.conversion.methods import uses_statistics
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.families import editable_layers


@dataclass
class ConversionArguments:
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value heads per layer; by default at most a quarter of the query heads."}
    )
    method: str = field(default="pca", metadata={"help": "How heads are merged.", "choices": list(METHODS)})
    key_method: str | None = field(
        default=None, metadata={"help": "Another method for the keys.", "choices": list(METHODS)}
    )
    grouping: str = field(
        default="adjacent", metadata={"help": "Which heads are merged together.", "choices": list(GROUPINGS)}
    )
    refit: bool = field(default=True, metadata={"help": "Refit the output projections after the merge."})
    calibration_samples: int = field(
        default=512, metadata={"help": "Training sentences for pca and the refit; 0 for none."}
    )


def main() -> None:
    arguments, conversion, training = parse_arguments(GlueArguments, ConversionArguments)
    if conversion.calibration_samples < 0:
        raise ValueError(f"--calibration_samples {conversion.calibration_samples} must be at least 0")
    run = GlueRun(arguments, training)
    # Refused before the first evaluation, which may take long.
    [number, *_] = targets.numbers(editable_layers(run.model), conversion.num_key_value_heads)
    run.model.to(training.device)
    run.evaluate("baseline")
    options = {"method": conversion.method, "key_method": conversion.key_method, "grouping": conversion.grouping}
    before = hf_attnkit.cache_bytes_per_token(run.model)
    calibration = list(run.training_batches(conversion.calibration_samples)) if conversion.calibration_samples else None
    if calibration and not conversion.refit:
        used = uses_statistics(conversion.method) or uses_statistics(conversion.key_method or "mean")
        calibration = collect(run.model, editable_layers(run.model), calibration) if used else None
    hf_attnkit.convert_to_gqa(run.model, number, calibration=calibration, **options)
    print(f"key/value bytes per token: {before:,} -> {hf_attnkit.cache_bytes_per_token(run.model):,}")
    run.evaluate("changed")
    if training.do_train:
        trained = run.train()
        run.evaluate("recovered", **trained)
    run.finish(**options, refit=conversion.refit, calibration_samples=conversion.calibration_samples)


if __name__ == "__main__":
    main()
