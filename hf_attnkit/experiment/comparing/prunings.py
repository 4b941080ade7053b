"""Prune the same model in many ways and measure each, without training and after it: what compare_pruning_* do."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.table import Table
from torch import Tensor
from transformers import set_seed

from hf_attnkit.experiment.comparing.distance import Distance
from hf_attnkit.experiment.files import show, write_json
from hf_attnkit.experiment.pruning import REFITS, Scoring, SelectionArguments, parse_options, prune
from hf_attnkit.experiment.record import Change
from hf_attnkit.experiment.refits import parse_refit
from hf_attnkit.experiment.run import Run

VARIANTS = [
    *("random", "magnitude", "entropy", "entropy:direction=diffuse", "confidence", "contribution"),
    *("entropy_contribution", "entropy_contribution:joint=hies", "gradient", "taylor", "fisher", "fisher+rearrange"),
    "l0",
]


@dataclass
class PruningComparisonArguments(SelectionArguments):
    reads_training_data: ClassVar[bool] = True
    prune_fractions: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.6, 0.7],
        metadata={"help": "Shares of all heads to remove, one after the other."},
    )
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS),
        metadata={
            "help": "Scores: a method, its options after a colon (entropy:direction=diffuse,normalize=false), and "
            "+rearrange for the mask search after fisher."
        },
    )
    refits: list[str] = field(
        default_factory=lambda: ["none", "output"],
        metadata={
            "help": f"Refits after the pruning: {', '.join(REFITS)}; options may follow (output:ridge=0.1,held_out=0)."
        },
    )

    def __post_init__(self) -> None:
        for name in ("prune_fractions", "variants", "refits"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {values} names one more than once")
        for fraction in self.prune_fractions:
            if not 0 < fraction < 1:
                raise ValueError(f"--prune_fractions {fraction} must be above 0 and below 1")
        self.fits = {refit: parse_refit(refit, "--refits", REFITS) for refit in self.refits}
        self.scorings = {variant: parse_variant(variant) for variant in self.variants}

    def check_sizes(self, score: str, refit: str) -> None:
        """Give the refit as much data as the scores where nothing else was asked for.

        Args:
            score, refit: the names of the two arguments, in sentences or tokens.

        Raises:
            ValueError: a size below 1, or one for a refit that there is none of.
        """
        if getattr(self, refit) is not None and self.refits == ["none"]:
            raise ValueError(f"--{refit} {getattr(self, refit)} has no effect with --refits none; leave it out")
        if getattr(self, refit) is None:
            setattr(self, refit, getattr(self, score))
        for name in (score, refit):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")


def parse_variant(variant: str) -> Scoring:
    """Raises `ValueError` for anything but a method, options that it has, and +rearrange after fisher."""
    described, plus, extra = variant.partition("+")
    if plus and extra != "rearrange":
        raise ValueError(f"--variants {variant!r}: +{extra} is unknown; only +rearrange may follow, after fisher")
    method, _, options = described.partition(":")
    pairs = options.split(",") if options else []
    scoring = Scoring(method, parse_options(pairs, f"--variants {variant!r}: the option"), bool(plus))
    scoring.check()
    return scoring


def compare(
    run: Run, arguments: PruningComparisonArguments, sizes: Mapping[str, int], distance: Distance | None = None
) -> None:
    """Measure the untouched model and every pruning of it, print a table and write results.json.

    With training, the untouched model is trained as long as the others: what recovery has to be compared with.

    Args:
        sizes: how much data scores and refit look at, in this order, by the names that results.json gives these.
        distance: to the untouched model, which is measured too.
    """
    original = run.model.to(run.training.device)
    run.evaluate("baseline")
    batches, refit_batches = (list(run.calibration_batches(size)) for size in sizes.values())
    chosen: dict[tuple[str, float], dict[int, list[int]]] = {}
    maps: dict[str, list[list[float | None]]] = {}
    for variant, scoring in arguments.scorings.items():
        if scoring.method == "random":
            scoring.options.setdefault("seed", run.training.seed)
        scores, gradients = scoring.scores(original, batches)
        maps[variant] = rows_of(scores)
        for fraction in arguments.prune_fractions:  # refused before anything is pruned, which takes longer
            chosen[variant, fraction] = arguments.select(original, scores, gradients, fraction=fraction)
            if not chosen[variant, fraction]:
                raise ValueError(f"--prune_fractions {fraction} removes no head: ask for more")
    if run.training.do_train:
        _recover(run, original)
    for (variant, fraction), removed in chosen.items():
        for refit in arguments.refits:
            run.model = copy.deepcopy(original)
            prune(run.model, removed, arguments.fits[refit], refit_batches)
            facts = {"variant": variant, "prune_fraction": fraction, "refit": refit}
            measured = {} if distance is None else distance.facts(run.model)
            run.evaluate("changed", **facts, removed=removed, **measured)
            print(
                f"{fraction:.0%} removed, {variant}, refit {refit}: {run.stages[-1]['metrics'] | measured}", flush=True
            )
            if run.training.do_train:
                _recover(run, run.model, **facts)
    run.model = original
    run.done = Change(
        "comparison", f"{len(arguments.variants)} ways to choose heads compared", {"variants": arguments.variants}
    )
    compared = {name: getattr(arguments, name) for name in ("prune_fractions", "variants", "refits")}
    results = run.results(**compared, **arguments.selection(), **sizes, scores=maps)
    if run.training.should_save:
        write_json(run.output / "results.json", results)
        run.progress.remove()
        print_comparison(results, str(run.data))


def _recover(run: Run, model: Any, **facts: Any) -> None:
    """Train a copy of the model from the same random state as all others, and measure it."""
    run.model = copy.deepcopy(model)
    set_seed(run.training.seed)
    trained = run.train()
    run.evaluate("recovered", **facts, **trained)
    print(f"    after training: {run.stages[-1]['metrics']}", flush=True)


def rows_of(scores: Tensor) -> list[list[float | None]]:
    """For JSON, which has no NaN: it marks the places of heads that a layer does not have."""
    return [[None if math.isnan(score) else score for score in row] for row in scores.tolist()]


def print_comparison(results: Mapping[str, Any], data: str) -> None:
    """For each stage one row per variant and refit, one column per share of heads: the task's first metric."""
    baseline = results["stages"][0]
    metric = next(iter(baseline["metrics"]))
    for name in ("changed", "recovered"):
        stages = [stage for stage in results["stages"] if stage["stage"] == name]
        if not stages:
            continue
        untouched = next((stage for stage in stages if "variant" not in stage), baseline)["metrics"][metric]
        found = {
            (stage["variant"], stage["refit"], stage["prune_fraction"]): {metric: stage["metrics"][metric]} | stage
            for stage in stages
            if "variant" in stage
        }
        titles = {metric: f"{metric}; untouched: {untouched:.4g}"}
        if any("distance" in stage for stage in stages):
            titles["distance"] = "distance to the untouched model"
        for measure, title in titles.items():
            table = Table(title=f"{results['task']} ({data}), {name}, {title}")
            for heading in ("heads removed", "refit", *(f"{fraction:.0%}" for fraction in results["prune_fractions"])):
                table.add_column(heading, justify="left" if heading in ("heads removed", "refit") else "right")
            for variant in results["variants"]:
                for refit in results["refits"]:
                    values = [found[variant, refit, fraction][measure] for fraction in results["prune_fractions"]]
                    table.add_row(variant, refit, *(f"{value:.4g}" for value in values))
            show(table)
