"""Recipes on two processes: as on one, whole or sharded. Gloo on the CPU stands for NCCL on GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetune_glue
import linearize_glue
import prune_heads_glue
import pytest
import torch
import uptrain_gqa_glue
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support.recipe_runs import flags, run
from support.sharded import run_recipes
from support.subprocesses import launched
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import hf_attnkit
from hf_attnkit.experiment import sharding as sharded

# Plain gradient descent, since Adam would turn rounding of small gradients into steps of full size. 37 sentences to
# evaluate on: the last batch is shared unevenly.
TRAINED = ("--optim", "sgd", "--learning_rate", "0.1", "--max_grad_norm", "0", "--max_eval_samples", "37",
           "--save_strategy", "steps", "--save_steps", "4")  # fmt: skip
CONVERTED = (*TRAINED, "--num_key_value_heads", "2", "--method", "mean", "--calibration_samples", "40")
# Random scores are the same in every process.
PRUNED = (*TRAINED, "--prune_fraction", "0.5", "--importance", "random")

LINEARIZED = (*TRAINED, "--transfer_learning_rate", "0.1", "--calibration_samples", "40", "--softmax_layers", "1",
              "--window", "4", "--gate")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    """Without dropout, whose masks two processes do not share."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    folder = tmp_path_factory.mktemp("bert") / "model"
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def launch(runs: Sequence[tuple[Any, list[str]]], *, kill_at: int | None = None, **environment: str) -> None:
    """Run recipes one after the other on the same two processes; dying before the training step of a number."""
    commands = [(str(Path(recipe.__file__)), arguments) for recipe, arguments in runs]
    for done in launched(2, run_recipes, commands, kill_at, environment=environment):
        assert (done.returncode != 0) == (kill_at is not None), done.stderr[-9000:]


def as_accelerate_launch_asks(*options: str) -> dict[str, str]:
    """The variables that it sets for the processes which it starts."""
    what = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    words = [*what, *options, "script"]
    return {
        name: value
        for name, value in prepare_multi_gpu_env(launch_command_parser().parse_args(words)).items()
        if name.startswith(("ACCELERATE_", "FSDP_"))
    }


def assert_same(two: Path, one: Path, start: Path) -> None:
    """Metrics, and weights up to the rounding of sums in another order."""
    (left, right) = (json.loads((folder / "results.json").read_text())["stages"] for folder in (two, one))
    assert [stage["metrics"] for stage in left] == [stage["metrics"] for stage in right]
    assert [stage["num_key_value_heads"] for stage in left] == [stage["num_key_value_heads"] for stage in right]
    found, expected = (hf_attnkit.load_pretrained(folder).state_dict() for folder in (two, one))
    # A gradient is a mean of 16 of about 1; 4 steps of 0.1 add up to 4 * 0.1 * 16 roundings of 2^-24, and what the
    # layers make of them, 10 times as much at most.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=4 * 0.1 * 16 * 2**-24 * 10)
    before = hf_attnkit.load_pretrained(start).state_dict()
    assert (before["classifier.weight"] - expected["classifier.weight"]).abs().max() > 1e-3


RUNS = {
    "finetune": (finetune_glue, TRAINED),
    "uptrain": (uptrain_gqa_glue, CONVERTED),
    "prune": (prune_heads_glue, PRUNED),
    "linearize": (linearize_glue, LINEARIZED),
}
FROM_TEACHER = ("--distill", "--distill_attention_weight", "0", "--lora", "--lora_r", "4")
SHARDED = {
    "uptrain": RUNS["uptrain"],
    "adapters": (uptrain_gqa_glue, (*CONVERTED, *FROM_TEACHER)),
    "prune": RUNS["prune"],
}
HALVED = ("--per_device_train_batch_size", "8")
# The error that a linearisation learns from is a ratio, which each batch has of its own.
ALONE = {"linearize": (*HALVED, "--gradient_accumulation_steps", "2")}


@pytest.fixture(scope="module")
def two(checkpoint: Path, tmp_path_factory) -> Path:
    """Where each run is that two processes made."""
    folder = tmp_path_factory.mktemp("two")
    launch([(recipe, flags(checkpoint, folder / name, *more, *HALVED)) for name, (recipe, more) in RUNS.items()])
    return folder


@pytest.fixture(scope="module")
def sharded_runs(checkpoint: Path, tmp_path_factory) -> Path:
    """Where each run is that two processes made, which trained sharded."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = [(recipe, flags(checkpoint, folder / name, *more, *HALVED, "--fsdp"))
            for name, (recipe, more) in SHARDED.items()]  # fmt: skip
    launch(runs)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_half_the_batch_each_are_one(name, two, checkpoint, tmp_path, monkeypatch) -> None:
    recipe, more = RUNS[name]
    run(recipe, monkeypatch, flags(checkpoint, tmp_path / "one", *more, *ALONE.get(name, ())))
    assert_same(two / name, tmp_path / "one", checkpoint)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_training_is_training(name, sharded_runs, checkpoint, tmp_path, monkeypatch) -> None:
    """A changed model trains sharded; its checkpoint and what is saved at the end load, and are equal."""
    recipe, more = SHARDED[name]
    run(recipe, monkeypatch, flags(checkpoint, tmp_path / "one", *more))
    assert_same(sharded_runs / name, tmp_path / "one", checkpoint)
    if "--lora" not in more:  # whose checkpoints are adapters
        places = (sharded_runs / name / "checkpoint-4", sharded_runs / name)
        last, final = (hf_attnkit.load_pretrained(place) for place in places)
        assert all(torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_sharded_training_on_gpus(checkpoint, tmp_path) -> None:
    """What is passed off as a GPU's process above, on GPUs."""
    arguments = flags(checkpoint, tmp_path / "out", *CONVERTED, "--per_device_train_batch_size", "8", "--fsdp")
    arguments.remove("--use_cpu")
    launch([(uptrain_gqa_glue, arguments)])
    last, final = (hf_attnkit.load_pretrained(tmp_path / "out" / name) for name in ("checkpoint-4", "."))
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True))
    before = hf_attnkit.load_pretrained(checkpoint).state_dict()
    assert not torch.equal(before["classifier.weight"], final.state_dict()["classifier.weight"])


def test_a_sharded_run_that_was_killed_goes_on(checkpoint, tmp_path) -> None:
    """As accelerate launch asks for it, to what it would have been, bit for bit."""
    arguments = (*CONVERTED, "--optim", "adamw_torch", "--per_device_train_batch_size", "8", "--save_steps", "2")
    whole, killed = (flags(checkpoint, tmp_path / name, *arguments) for name in ("whole", "killed"))
    shard = as_accelerate_launch_asks("--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT")
    launch([(uptrain_gqa_glue, whole)], **shard)
    launch([(uptrain_gqa_glue, killed)], kill_at=4, **shard)
    assert not (tmp_path / "killed" / "results.json").exists()
    launch([(uptrain_gqa_glue, [*killed, "--resume_from_checkpoint"])], **shard)
    recovered = json.loads((tmp_path / "killed" / "results.json").read_text())["stages"][-1]
    assert recovered["resumed_from"].endswith("checkpoint-2")
    found, expected = (hf_attnkit.load_pretrained(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sharding_that_would_not_happen_is_refused(checkpoint, tmp_path) -> None:
    """accelerate takes --fsdp on CPU processes and trains unsharded."""
    with pytest.raises(ValueError, match="FSDP was asked for and accelerate does not shard here"):
        sharded.keep_whole(SimpleNamespace(is_fsdp_enabled=False))
    plugin = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="FSDP1 is not supported"):
        sharded.keep_whole(SimpleNamespace(is_fsdp_enabled=True, accelerator=plugin))
