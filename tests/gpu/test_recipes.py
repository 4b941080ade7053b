"""The recipes on a GPU in bfloat16, in this process, on a tiny model and a few rows."""

# ruff: noqa: F811

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetune_glue
import prune_heads_glue
import pytest
import swap_attention_glue
import torch
import uptrain_gqa_glue
import uptrain_gqa_lm
from compare import conversions_glue, pruning_glue
from support import recipe_runs, text_runs
from support.gpu import DEVICE, ON_GPU, needs_gpu
from support.kills import CONVERTED, EACH_STEP, Killed, checkpoint, dies, outcome  # noqa: F401  # a fixture
from transformers import Trainer

import hf_attnkit

pytestmark = [needs_gpu, pytest.mark.slow]

RECIPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "finetune": (finetune_glue, ()),
    "prune": (prune_heads_glue, ("--prune_fraction", "0.5", "--refit", "output", "--score_samples", "32")),
    "uptrain": (uptrain_gqa_glue, CONVERTED),
    "uptrain, distilled, adapters": (uptrain_gqa_glue, (*CONVERTED, "--distill", "--lora", "--lora_r", "4")),
    "swap": (swap_attention_glue, ("--attention", "sliding_window", "--attention_options", "window=4")),
    "swap to linear": (swap_attention_glue, ("--attention", "linear", "--attention_options", "window=4")),
    "compare prunings": (
        pruning_glue,
        ("--do_eval", "--prune_fractions", "0.5", "--variants", "random", "entropy", "gradient", "--refits", "output",
         "--score_samples", "32"),
    ),
    "compare conversions": (
        conversions_glue,
        ("--num_key_value_heads", "2", "--variants", "mean", "pca+data+refit", "--calibration_samples", "32"),
    ),
}  # fmt: skip


def on_gpu(arguments: list[str], *more: str) -> list[str]:
    """The same there, in bfloat16."""
    return [each for each in arguments if each != "--use_cpu" or not ON_GPU] + ["--bf16", *more]


@pytest.mark.parametrize("name", RECIPES)
def test_runs_to_its_end(name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, more = RECIPES[name]
    if recipe in (pruning_glue, conversions_glue):
        more = (*more, "--disable_tqdm", "true")
    arguments = on_gpu(recipe_runs.flags(checkpoint, tmp_path / "out", *more))
    results = recipe_runs.run(recipe, monkeypatch, arguments)
    where = results["device"] if "device" in results else results["machine"]
    assert ("CPU" in where) is not ON_GPU
    if not name.startswith("compare"):
        saved = hf_attnkit.load_pretrained(tmp_path / "out", device_map=DEVICE)
        assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_a_language_model(text_checkpoint: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_gpu(text_runs.flags(text_checkpoint, tmp_path / "out", text, "--distill"))
    results = text_runs.run(monkeypatch, arguments)
    assert [stage["stage"] for stage in results["stages"]] == ["baseline", "changed", "recovered"]
    assert uptrain_gqa_lm.__name__ == "uptrain_gqa_lm"


def test_an_interrupted_run_resumes(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same stages; sums of gradients may be taken in another order on a GPU, which moves losses a little."""
    arguments = on_gpu(recipe_runs.flags(checkpoint, tmp_path / "out", *EACH_STEP, *CONVERTED), "--max_steps", "4")
    with monkeypatch.context() as patched:
        dies(patched, Trainer, "training_step", 3)
        with pytest.raises(Killed):
            recipe_runs.run(uptrain_gqa_glue, patched, arguments)
    results = recipe_runs.run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert results["stages"][-1]["resumed_from"] == "checkpoint-2"
    assert [stage["stage"] for stage in outcome(results)] == ["baseline", "changed", "recovered"]
