"""Convert the same model in many ways and measure each without training: what the compare_conversions recipes do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.table import Table
from transformers import set_seed

import hf_attnkit
from hf_attnkit.conversion import METHODS
from hf_attnkit.conversion.methods.table import uses_statistics
from hf_attnkit.conversion.statistics import collect
from hf_attnkit.conversion.target_heads import target_heads
from hf_attnkit.experiment.comparing.distance import Distance
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.record import Change
from hf_attnkit.experiment.refits import parse_refit
from hf_attnkit.experiment.run import Run
from hf_attnkit.models.layers import projected_layers
from hf_attnkit.refitting.options import RefitOptions, require_no_stream

EXTRAS = ("data", "output", "refit", "descent", "best", "spent")
REFITS = {"output": "output", "refit": "full", "descent": "descent"}
VARIANTS = [
    *("first", "random", "mean", "norm_mean", "procrustes", "pca", "pca+data", "pca+data+best"),
    *("mean+refit", "procrustes+refit", "pca+data+output", "pca+data+refit", "pca+data+refit+best"),
    "pca+data+descent+best",
]


@dataclass
class ComparisonArguments:
    reads_training_data: ClassVar[bool] = True
    num_key_value_heads: list[int] = field(
        metadata={"help": "Numbers of key/value heads to convert to, one after the other."}
    )
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS),
        metadata={
            "help": "A method, then what is added: data (second moments of calibration data), output (refit of the "
            "output projections), refit (of queries and outputs), descent (a refit too, of all four projections), best "
            "(grouping), spent (the same cache, spent over the layers). A refit's options may follow it "
            "(refit:ridge=0.1,held_out=0)."
        },
    )

    def __post_init__(self) -> None:
        for variant in self.variants:
            method, *extras = (part.partition(":")[0] for part in variant.split("+"))
            known = method in METHODS and set(extras) <= set(EXTRAS) and len(set(extras)) == len(extras)
            if not known or len(set(REFITS) & set(extras)) > 1:
                raise ValueError(
                    f"--variants {variant!r} must be one of {', '.join(METHODS)}, followed by any of "
                    f"{', '.join(f'+{extra}' for extra in EXTRAS)}, but one of "
                    f"{', '.join(f'+{refit}' for refit in REFITS)}"
                )
            refits, looks = bool(set(REFITS) & set(extras)), uses_statistics(method)
            if ("data" in extras) > looks or (looks and refits and "data" not in extras):
                raise ValueError(
                    f"--variants {variant!r}: +data goes with pca, which looks at the data that it is refitted on, and "
                    "with no other method"
                )
            refit_of(variant)


def refit_of(variant: str) -> RefitOptions | None:
    """The refit that a variant asks for, if any; raises `ValueError` for options that it does not have."""
    found = None
    for part in variant.split("+"):
        word, colon, options = part.partition(":")
        if word in REFITS:
            found = parse_refit(f"{REFITS[word]}{colon}{options}", f"--variants {variant!r}:")
            try:
                require_no_stream(found)
            except ValueError as error:
                raise ValueError(f"--variants {variant!r}: {error}") from error
        elif colon:
            raise ValueError(f"--variants {variant!r}: {word!r} has no options; leave {colon}{options} out")
    return found


def compare(
    run: Run, arguments: ComparisonArguments, calibration: tuple[str, int], distance: Distance | None = None
) -> None:
    """Measure the untouched model and every conversion of it, print a table and write results.json.

    Args:
        calibration: what its size is called in results.json, and the size: sentences or tokens.
        distance: to the untouched model, which is measured too.
    """
    for number in arguments.num_key_value_heads:
        target_heads(projected_layers(run.model), number)  # refused before the first evaluation
    original = run.model.to(run.training.device)
    run.evaluate("baseline")
    batches = list(run.calibration_batches(calibration[1]))
    moments = collect(original, projected_layers(original), batches)
    for number in arguments.num_key_value_heads:
        for variant in arguments.variants:
            method, *extras = variant.split("+")
            run.model = copy.deepcopy(original)
            set_seed(run.training.seed)  # "random" draws
            options: dict[str, Any] = {"method": method, "grouping": "best" if "best" in extras else "adjacent"}
            if "spent" in extras:
                share = number / projected_layers(original)[0].num_key_value_heads
                options |= {"num_key_value_heads": None, "budget": share, "uniform": False}
            else:
                options |= {"num_key_value_heads": number}
            if (refit := refit_of(variant)) is not None:
                options |= {"calibration": batches, "refit": refit}
            elif "data" in extras:
                options |= {"calibration": moments, "refit": False}
            hf_attnkit.convert_to_gqa(run.model, **options)
            measured = {} if distance is None else distance.facts(run.model)
            run.evaluate("changed", variant=variant, **measured)
            print(f"{number} key/value heads, {variant}: {run.stages[-1]['metrics'] | measured}", flush=True)
    run.model = original
    run.done = Change(
        "comparison",
        f"{len(arguments.variants)} ways to merge key/value heads compared",
        {"variants": arguments.variants},
    )
    facts = {
        "num_key_value_heads": arguments.num_key_value_heads,
        "variants": arguments.variants,
        calibration[0]: calibration[1],
    }
    results = run.results(**facts)
    if run.training.should_save:
        write_json(run.output / "results.json", results)
        run.progress.remove()
        print_comparison(results, str(run.data))


def print_comparison(results: Mapping[str, Any], data: str) -> None:
    """One row per variant, one column per number of heads: the task's first metric."""
    baseline, *others = results["stages"]
    metric = next(iter(baseline["metrics"]))
    columns = [(variant, number) for number in results["num_key_value_heads"] for variant in results["variants"]]
    found = dict(zip(columns, others, strict=True))
    titles = {metric: f"{metric}; untouched: {baseline['metrics'][metric]:.4g}"}
    if any("distance" in stage for stage in others):
        titles["distance"] = "distance to the untouched model"
    for name, title in titles.items():
        table = Table(title=f"{results['task']} ({data}), {title}")
        table.add_column("")
        for number in results["num_key_value_heads"]:
            table.add_column(f"{baseline['num_key_value_heads'][0]} -> {number}", justify="right")
        for variant in results["variants"]:
            stages = [found[variant, number] for number in results["num_key_value_heads"]]
            table.add_row(variant, *(f"{stage.get(name, stage['metrics'].get(name)):.4g}" for stage in stages))
        show(table)
