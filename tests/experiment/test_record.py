"""results.json says what was done to which model on which data: for our recipes, a user's recipe and a user's task."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import finetune_glue
import prune_heads_glue
import pytest
import uptrain_gqa_glue
from support.glue_files import tiny_checkpoint, write
from support.recipe_runs import flags, run
from support.task_runs import flags as task_flags
from transformers import BertConfig, BertModel

from hf_attnkit.experiment.glue.tasks import TASKS, Task, TsvLayout
from hf_attnkit.experiment.record import Data, command, command_digest, describe_model

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)

# A recipe as a user would write it.
MINE = """
from dataclasses import dataclass, field

import hf_attnkit
from hf_attnkit.experiment.arguments import ChangeArguments
from hf_attnkit.experiment.glue.run import GlueArguments, GlueRun
from hf_attnkit.experiment.sweep import run_each


@dataclass
class Mine(ChangeArguments):
    head: int = field(default=0, metadata={"help": "The head of the first layer to remove."})


def main():
    run_each(remove_one, GlueArguments, Mine)


def remove_one(arguments, mine, training):
    run = GlueRun(arguments, training, mine)
    run.model.to(training.device)
    run.evaluate("baseline")
    run.change(
        lambda: hf_attnkit.prune_heads(run.model, {0: [mine.head]}),
        kind="one-head", title=f"head {mine.head} of the first layer removed", facts={"head": mine.head},
    )
    run.evaluate("changed")
    if training.do_train:
        run.evaluate("recovered", **run.train())
    run.finish(head=mine.head)


if __name__ == "__main__":
    main()
"""


def run_mine(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict:
    script = folder / "mine.py"
    script.write_text(MINE)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    return json.loads((Path(arguments[arguments.index("--output_dir") + 1]) / "results.json").read_text())


@only_bert
@pytest.mark.slow
def test_a_recipe_of_a_user_tells_the_truth_with_a_control(checkpoint, tmp_path, monkeypatch) -> None:
    arguments = flags(checkpoint, tmp_path / "out", "--head", "2", "--control", "--learning_rate", "1e-2")
    results = run_mine(tmp_path, monkeypatch, arguments)
    facts = {"kind": "one-head", "title": "head 2 of the first layer removed", "facts": {"head": 2}}
    assert results["change"] == facts and results["head"] == 2
    assert [stage["stage"] for stage in results["stages"]] == ["baseline", "control", "changed", "recovered"]
    assert results["control"] == 1 and results["actions"] == {"trained": True, "measured": True, "predicted": False}
    assert results["model"] == {
        "name": "BertForSequenceClassification", "path": "local", "model_type": "bert", "base_model": None,
    }  # fmt: skip
    assert [stage["num_heads"] for stage in results["stages"]] == [[4, 4], [4, 4], [3, 4], [3, 4]]
    assert {stage["key_value_bytes_per_token"] for stage in results["stages"]} == {None}
    # The control is the untouched model after plain training, and what follows it is a run without it.
    alone = run(finetune_glue, monkeypatch, flags(checkpoint, tmp_path / "alone", "--learning_rate", "1e-2"))
    assert results["stages"][1]["metrics"] == alone["stages"][0]["metrics"]
    assert results["stages"][1]["training_loss"] == alone["stages"][0]["training_loss"]
    without = run_mine(
        tmp_path, monkeypatch, [*flags(checkpoint, tmp_path / "b", "--head", "2"), "--learning_rate", "1e-2"]
    )
    kept = [results["stages"][place] for place in (0, 2, 3)]
    assert [stage["metrics"] for stage in kept] == [stage["metrics"] for stage in without["stages"]]
    assert kept[-1]["training_loss"] == without["stages"][-1]["training_loss"] and without["control"] is None
    assert not list((tmp_path / "out").glob("changed-*"))
    # Timed: the stages of the smaller model against the first.
    timing = results["timing"]
    assert [stage["stage"] for stage in timing["stages"]] == ["baseline", "control", "changed", "recovered"]
    ratios = [stage["ratio"] for stage in timing["stages"]]
    assert ratios[0] == ratios[1] == {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0}
    assert ratios[2] == ratios[3] and 0 < ratios[2]["lower_quartile"] <= ratios[2]["median"]
    assert timing["batch_size"] == 8 and timing["repeats"] > 1
    assert str(tmp_path) not in results["command"] and results["command"].startswith("python mine.py")


@only_bert
def test_a_control_without_training_or_measuring_is_refused(checkpoint, tmp_path, monkeypatch) -> None:
    for alone in ("--do_eval", "--do_train"):
        more = ("--num_key_value_heads", "2", "--control", alone)
        with pytest.raises(ValueError, match="--control trains and measures"):
            run(uptrain_gqa_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))


@only_bert
@pytest.mark.slow
def test_the_control_of_rounds_trains_as_long_as_all_of_them(checkpoint, tmp_path, monkeypatch) -> None:
    more = ("--prune_fraction", "0.5", "--prune_steps", "2", "--importance", "random", "--refit", "none", "--control")
    results = run(prune_heads_glue, monkeypatch, flags(checkpoint, tmp_path / "out", *more))
    steps = [json.loads((tmp_path / "out" / name).read_text())["global_step"] for name in
             ("control_state.json", "trainer_state_1.json", "trainer_state_2.json")]  # fmt: skip
    assert steps == [8, 4, 4]
    assert results["change"]["title"] == "half of the attention heads removed"
    assert results["change"]["facts"] == {"heads": 8, "removed": 4, "score": "random", "refit": "none"}
    labels = [stage["stage"] for stage in results["timing"]["stages"]]
    assert labels == [
        "baseline",
        "control",
        *(f"{name}, round {n}" for n in (1, 2) for name in ("changed", "recovered")),
    ]


# Tasks.


@pytest.fixture
def reviews(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A row of the table that is no task of GLUE, and its files."""
    layout = TsvLayout(text_fields=("text",), label_field="label", label_kind="word")
    row = Task("reviews", "Reviews", ("text",), ("bad", "good"), ("accuracy",), layout)
    monkeypatch.setitem(TASKS, "reviews", row)
    folder = tmp_path / "data" / "Reviews"
    folder.mkdir(parents=True)
    rows = [["text", "label"], *([f"quote {i} test", ("bad", "good")[i % 2]] for i in range(12))]
    for name in ("train.tsv", "dev.tsv"):
        write(folder / name, rows)
    write(folder / "test.tsv", [["text"], *([f"quote {i}"] for i in range(3))])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bert") / "model")


def test_a_task_outside_glue_is_not_called_one(reviews, tiny, tmp_path, monkeypatch) -> None:
    results = run(finetune_glue, monkeypatch, task_flags(tiny, "reviews", reviews.parent, tmp_path / "out"))
    assert results["data"] == {
        "name": "Reviews", "hub_path": "local", "config": None, "language": None, "task_type": "text-classification",
        "train_examples": 12, "evaluation_examples": 12, "is_benchmark": False, "note": None,
        "splits": {"train": "train", "evaluation": "validation"},
    }  # fmt: skip
    assert "GLUE" not in str(Data("Reviews", "local", "text-classification", evaluation_split="validation"))
    with pytest.raises(FileNotFoundError, match="no dataset on the hub: give data_dir"):
        run(finetune_glue, monkeypatch, task_flags(tiny, "reviews", None, tmp_path / "hub"))


@pytest.mark.parametrize(
    ("only", "needed", "actions"),
    [
        (("--do_eval",), "dev.tsv", {"trained": False, "measured": True, "predicted": False}),
        (
            ("--predict", "--do_train", "false", "--do_eval", "false"),
            "test.tsv",
            {"trained": False, "measured": False, "predicted": True},
        ),
    ],
)
def test_what_is_not_read_need_not_be_there(
    only, needed, actions, reviews, tiny, tmp_path, monkeypatch, capsys
) -> None:
    for file in reviews.iterdir():
        if file.name != needed:
            file.unlink()
    results = run(finetune_glue, monkeypatch, task_flags(tiny, "reviews", reviews.parent, tmp_path / "out", *only))
    assert results["actions"] == actions and results["change"] is None
    assert results["data"]["train_examples"] is None and results["data"]["splits"]["train"] is None
    assert ("━" in capsys.readouterr().out) == actions["measured"]  # no table of nothing


# Names.


@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        ("/x/y/recipes/compare/pruning_lm.py", [], "python recipes/compare/pruning_lm.py"),
        ("/x/mine.py", ["--output_dir", "/x/out", "--seed", "1"], "python mine.py --output_dir out --seed 1"),
        ("recipes/demo.py", ["--model=/x/a/b", "--m", "org/name"], "python recipes/demo.py --model=b --m org/name"),
        ("a.py", ["--hub_token", "secret", "--hub-token=secret"], "python a.py --hub_token ... --hub-token=..."),
    ],
)
def test_a_command_shows_no_folder_of_this_machine_and_no_secret(script, words, shown) -> None:
    assert command([script, *words]) == shown


def test_commands_that_look_alike_are_told_apart() -> None:
    one, other = (["r.py", "--model_name_or_path", f"/{place}/model"] for place in "ab")
    assert command(one) == command(other) and command_digest(one) != command_digest(other)
    assert command_digest([*one, "--resume_from_checkpoint", "true"]) == command_digest(["/x/r.py", *one[1:]])


def test_a_model_is_called_by_its_name(tmp_path) -> None:
    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8))  # fmt: skip
    assert describe_model("org/tiny-bert", model)["name"] == "tiny-bert"
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert describe_model(str(folder), model)["name"] == "BertModel"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/MiniLM"}))
    described = {"name": "MiniLM", "path": "local", "model_type": "bert", "base_model": "org/MiniLM"}
    assert describe_model(str(folder), model) == described
    (folder / "results.json").write_text(json.dumps({"model": {"name": "First", "path": "org/First"}}))
    assert describe_model(str(folder), model)["name"] == "First"
    assert describe_model(str(folder), model)["base_model"] == "org/First"
