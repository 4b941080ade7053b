"""Convert a fine-tuned model to grouped-query attention and recover it: evaluate, convert, evaluate, train, evaluate.

    accelerate launch recipes/uptrain_gqa_glue.py --model_name_or_path outputs/cola --task_name cola \\
        --num_key_value_heads 3 --method mean --learning_rate 3e-5 --num_train_epochs 1 \\
        --per_device_train_batch_size 32 --output_dir outputs/cola-gqa

Writes the recovered model and results.json (stages "baseline", "changed", "recovered") into --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from glue_run import GlueArguments, GlueRun, parse_arguments

import hf_attnkit
from hf_attnkit.conversion import METHODS, target_heads
from hf_attnkit.families import attention_layers


@dataclass
class ConversionArguments:
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value heads per layer; by default at most a quarter of the query heads."}
    )
    method: str = field(default="mean", metadata={"help": "How heads are merged.", "choices": list(METHODS)})


def main() -> None:
    arguments, conversion, training = parse_arguments(GlueArguments, ConversionArguments)
    run = GlueRun(arguments, training)
    # Refused before the first evaluation, which may take long.
    number = target_heads(attention_layers(run.model), conversion.num_key_value_heads)
    run.evaluate("baseline")
    hf_attnkit.convert_to_gqa(run.model, number, method=conversion.method)
    run.evaluate("changed")
    if training.do_train:
        trained = run.train()
        run.evaluate("recovered", **trained)
    run.finish(method=conversion.method)


if __name__ == "__main__":
    main()
