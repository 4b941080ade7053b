"""A run killed at any moment resumes to what it would have been."""

# ruff: noqa: F811

from __future__ import annotations

import json

import finetune_glue
import pytest
import transformers
import uptrain_gqa_glue
from support import text_runs
from support.fakes import never
from support.kills import (  # noqa: F401  # fixtures among them
    CONVERTED,
    EACH_STEP,
    Killed,
    assert_same,
    checkpoint,
    dies,
    interrupted,
    killed,
    second,
    whole,
)
from support.recipe_runs import flags, run
from transformers import (
    Trainer,
)

import hf_attnkit
from hf_attnkit.experiment import resume as restart
from hf_attnkit.experiment.arguments import parse_arguments
from hf_attnkit.experiment.glue.run import GlueArguments

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "what", "number", "more"),
    [
        (finetune_glue, "step", 7, ()),
        (uptrain_gqa_glue, "file", 3, (*CONVERTED, "--save_total_limit", "1")),
        (uptrain_gqa_glue, "step", 3, (*CONVERTED, "--lora", "--lora_r", "4", "--distill", "--lora_dropout", "0.1")),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    recipe, what, number, more, checkpoint, tmp_path, monkeypatch
) -> None:  # fmt: skip
    arguments = flags(checkpoint, tmp_path / "killed", *EACH_STEP, *more)
    killed(what, number, recipe, arguments)
    assert not (tmp_path / "killed" / "results.json").exists()
    monkeypatch.setattr(hf_attnkit, "convert_to_gqa", never(hf_attnkit.convert_to_gqa, "converted again"))
    results = run(recipe, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    monkeypatch.undo()
    assert results["stages"][-1]["resumed_from"] == f"checkpoint-{number - 1}"
    run(recipe, monkeypatch, flags(checkpoint, tmp_path / "whole", *EACH_STEP, *more))
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("more", [(), ("--distill", "--lora", "--lora_r", "4")])
def test_a_killed_run_on_text_ends_as_one_that_was_not(
    more, byte_tokenizer, text, tmp_path, monkeypatch
) -> None:  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
        attention_dropout=0.1,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")

    def arguments(name: str) -> list[str]:
        each = ("--validation_file", str(text[1]), "--save_strategy", "steps", "--save_steps", "2", *more)
        return text_runs.flags(tmp_path / "model", tmp_path / name, text, *each)

    with monkeypatch.context() as patched:
        dies(patched, Trainer, "training_step", 4)
        with pytest.raises(Killed):
            text_runs.run(monkeypatch, arguments("killed"))
    results = text_runs.run(monkeypatch, [*arguments("killed"), "--resume_from_checkpoint", "true"])
    assert results["stages"][-1]["resumed_from"].endswith("checkpoint-2")
    text_runs.run(monkeypatch, arguments("whole"))
    assert_same(tmp_path / "killed", tmp_path / "whole")


MOMENTS = {
    "in the baseline's evaluation": (Trainer, "evaluate", 1, None),
    "in the conversion": (hf_attnkit, "convert_to_gqa", 1, None),
    "while the converted model is written": (transformers.modeling_utils, "safe_save_file", 1, second),
    "before the converted model is noted": (restart, "write_json", 2, None),
    "in the second evaluation": (Trainer, "evaluate", 2, None),
    "before the first step": (Trainer, "training_step", 1, None),
    "before the first checkpoint is noted": (restart.WholeCheckpoints, "on_save", 1, None),
    "while a later one's weights are written": (transformers.modeling_utils, "safe_save_file", 4, second),
    "while its state is written": (transformers.TrainerState, "save_to_json", 4, second),
    "while old ones are removed": (restart.shutil, "rmtree", 3, None),
    "in the last evaluation": (Trainer, "evaluate", 3, None),
    "while the trained model is written": (transformers.modeling_utils, "safe_save_file", 10, second),
    "before the results are written": (Trainer, "is_world_process_zero", 1, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_any_moment_will_do(moment, checkpoint, whole, tmp_path, monkeypatch) -> None:
    owner, name, number, half = MOMENTS[moment]
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED, "--save_total_limit", "1")
    with monkeypatch.context() as patched:
        dies(patched, owner, name, number, half=half)
        with pytest.raises(Killed):
            run(uptrain_gqa_glue, monkeypatch, arguments)
    run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint"])
    assert_same(tmp_path, whole)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_named_checkpoint_is_gone_on_from(checkpoint, whole, tmp_path, monkeypatch) -> None:
    """Also where later ones are whole: they are not, once training goes on before them."""
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED)
    for number, more in ((6, ()), (3, ("--resume_from_checkpoint", str(tmp_path / "checkpoint-2")))):
        with monkeypatch.context() as patched:
            dies(patched, Trainer, "training_step", number)
            with pytest.raises(Killed):
                run(uptrain_gqa_glue, monkeypatch, [*arguments, *more])
    assert json.loads((tmp_path / "progress.json").read_text())["checkpoints"] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="checkpoint-5 is not a whole checkpoint"):
        run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint", str(tmp_path / "checkpoint-5")])
    results = run(uptrain_gqa_glue, monkeypatch, [*arguments, "--resume_from_checkpoint", "true"])
    assert results["stages"][-1]["resumed_from"] == "checkpoint-4"
    assert_same(tmp_path, whole)


def test_a_checkpoint_of_another_folder_is_gone_on_from(
    checkpoint, interrupted, whole, tmp_path, monkeypatch
) -> None:  # fmt: skip
    """After the same evaluation and conversion, which that folder's run had done."""
    named = str(interrupted / "checkpoint-2")
    arguments = flags(checkpoint, tmp_path, *EACH_STEP, *CONVERTED, "--resume_from_checkpoint", named)
    assert run(uptrain_gqa_glue, monkeypatch, arguments)["stages"][-1]["resumed_from"] == "checkpoint-2"
    assert_same(tmp_path, whole)


def test_with_nothing_to_go_on_from_a_run_starts(checkpoint, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, [*flags(checkpoint, tmp_path), "--resume_from_checkpoint"])
    assert "resumed_from" not in results["stages"][0] and "training_loss" in results["stages"][0]


def test_the_best_checkpoint_stays(checkpoint, tmp_path, monkeypatch) -> None:
    best = ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--save_total_limit", "1")
    monkeypatch.setattr(Trainer, "_determine_best_metric", lambda self, metrics, trial: first_is_best(self))
    run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path, *EACH_STEP, *best))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-8"]


def first_is_best(trainer: Trainer) -> bool:
    is_first = trainer.state.global_step == 1
    if is_first:
        trainer.state.best_global_step, trainer.state.best_metric = 1, 0.0
    return is_first


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "--do_train"], "true"),
        (["--resume_from_checkpoint", "x/checkpoint-5"], "x/checkpoint-5"),
        ([], None),
    ],
)
def test_the_flag_may_stand_alone(given, expected) -> None:
    argv = ["--model_name_or_path", "m", "--task_name", "demo", "--output_dir", "x", "--use_cpu", *given]
    assert parse_arguments(GlueArguments, argv=argv)[1].resume_from_checkpoint == expected
