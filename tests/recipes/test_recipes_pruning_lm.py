"""The pruning recipe for causal language models on a tiny Llama: what it removes, rounds, adapters, a teacher."""

# ruff: noqa: F811

from __future__ import annotations

import json
from pathlib import Path

import prune_heads_lm
import pytest
import torch
from support.recipe_runs import run
from support.text_runs import byte_tokenizer, text, text_checkpoint  # noqa: F401  # fixtures
from transformers import AutoModelForCausalLM

import hf_attnkit
from hf_attnkit.experiment.pruning_rounds import number_of_heads
from hf_attnkit.experiment.training.distill import DistillationTrainer

HALF = ("--prune_fraction", "0.5")


def text_flags(checkpoint: Path, output: Path, text: tuple[Path, Path], *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(checkpoint), "--output_dir", str(output), "--train_file", str(text[0])),
        *("--validation_file", str(text[1]), "--block_size", "32", "--score_tokens", "96", "--max_steps", "3"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3", "--learning_rate", "1e-2"),
        *("--report_to", "none", "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "true", *more),
    ]


def test_a_language_model_is_pruned_on_text_by_what_the_library_does(
    text_checkpoint, text, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    more = ("--prune_fraction", "0.25", "--refit", "scale", "--refit_tokens", "1000000", "--do_eval")
    results = run(prune_heads_lm, monkeypatch, text_flags(text_checkpoint, tmp_path, text, *more))
    model = hf_attnkit.load_pretrained(text_checkpoint, AutoModelForCausalLM)
    ids = torch.tensor(byte_tokenizer(text[0].read_text())["input_ids"])
    blocks = ids[: ids.numel() // 32 * 32].view(-1, 32)
    batches = [{"input_ids": part, "labels": part} for part in blocks.split(3)]
    scores = hf_attnkit.head_importance(model, batches[:1], method="gradient")
    removed = hf_attnkit.select_heads(scores, model=model, fraction=0.25)
    assert {int(layer): heads for layer, heads in results["stages"][1]["removed"].items()} == removed
    assert results["score_tokens"] == 96 and results["refit_tokens"] == blocks.numel()
    assert results["importance"] == "gradient"  # the recipe's default
    hf_attnkit.prune_heads(model, removed, calibration=batches, refit="scale")
    saved = hf_attnkit.load_pretrained(tmp_path, AutoModelForCausalLM).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-5)  # batches with and without masks


def test_rounds_on_text_learn_from_the_untouched_model_through_adapters(
    text_checkpoint, text, tmp_path, monkeypatch
) -> None:
    """And the control trains as long as both rounds together, by its labels alone."""
    teachers: list[int] = []
    compute = DistillationTrainer.compute_loss

    def compute_and_see(self, model, *others, **options):
        teachers.append(number_of_heads(self.teacher))
        return compute(self, model, *others, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_and_see)
    more = ("--prune_fraction", "0.5", "--prune_steps", "2", "--distill", "--lora", "--lora_r", "4", "--control")
    results = run(prune_heads_lm, monkeypatch, text_flags(text_checkpoint, tmp_path, text, *more))
    stages = [(stage["stage"], stage.get("round"), sum(stage["num_heads"])) for stage in results["stages"]]
    assert stages == [
        ("baseline", None, 8), ("control", None, 8), ("changed", 1, 6), ("recovered", 1, 6), ("changed", 2, 4),
        ("recovered", 2, 4),
    ]  # fmt: skip
    assert teachers and set(teachers) == {8}
    trained = [stage["trained_parameters"] for stage in results["stages"] if "trained_parameters" in stage]
    assert trained[0] > trained[1] > trained[2]  # A and B are as wide as the heads that are left
    states = ("control_state.json", "trainer_state_1.json", "trainer_state_2.json")
    assert [json.loads((tmp_path / name).read_text())["global_step"] for name in states] == [6, 3, 3]
    assert results["distill_weight"] == 0.5 and results["lora_r"] == 4
    assert not list(tmp_path.glob("adapter*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--score_tokens", "0"], "score_tokens 0"), (["--refit", "none", "--refit_tokens", "8"], "has no effect"),
     (["--distill"], "no effect without training"), (["--lora"], "no effect without training")],
)  # fmt: skip
def test_bad_input_for_text_is_named(wrong, message, text_checkpoint, text, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=message):
        run(
            prune_heads_lm,
            monkeypatch,
            text_flags(text_checkpoint, tmp_path / "out", text, *HALF, "--do_eval", *wrong),
        )
    assert not (tmp_path / "out").exists()
