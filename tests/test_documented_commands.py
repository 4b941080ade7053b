"""Every command that the documentation shows runs to its end, with a tiny model and a handful of rows.

README's are the quick tests of the recipes: `make check` runs them.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from support.shown_commands import ROOT, Shown, run_by_a_shell, shown_commands
from support.subprocesses import Done, finished_python
from support.tiny_runs import CLI, Command, Workplace, command_of, takes, write_shared
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from hf_attnkit.experiment import pruning_rounds
from hf_attnkit.experiment.benchmarking import quantities
from hf_attnkit.experiment.glue.tasks import TASKS
from hf_attnkit.pruning import select_for_target
from hf_attnkit.pruning.select_for_target import forward_share

with tempfile.TemporaryDirectory() as empty:
    SHOWN = shown_commands(Path(empty))
LABELLED = [name for name, task in TASKS.items() if task.is_labelled]
# Flags whose values make no other run: names of files and folders, and numbers that only training reads.
ALIKE = ("--changed", "--compare_with", "--data_dir", "--learning_rate", "--model_name_or_path", "--num_train_epochs",
         "--output", "--output_dir", "--output_file", "--per_device_eval_batch_size", "--per_device_train_batch_size",
         "--report_to", "--save_strategy", "--seed", "--seeds", "--train_file", "--validation_file")  # fmt: skip


def pattern(shown: Shown) -> tuple[str, frozenset[str]]:
    """The same for commands that differ in numbers, in names of files and models and in the single task alone."""
    command, kept, flag = command_of(shown), set(), ""
    for word in command.arguments:
        flag = word if word.startswith("--") else flag
        number = word.replace(".", "").replace("-", "").replace("e", "").isdigit()
        named = command.target == CLI and not flag and word != command.arguments[0]  # a model, or a folder
        if not (flag in ALIKE or number or named or word in LABELLED):
            kept.add(word)
    return command.target, frozenset(kept)


def different(shown: list[Shown]) -> dict[str, Shown]:
    """The first of each pattern by its place and number; shortened commands are left out."""
    found: dict[tuple[str, frozenset[str]], str] = {}
    for number, one in enumerate(shown):
        if not one.is_shortened:
            found.setdefault(pattern(one), f"{one.place}-{number}")
    return {name: shown[int(name.rpartition("-")[2])] for name in found.values()}


RUNS = different(SHOWN)


def not_run(command: Command) -> str | None:
    """Why a command is only parsed here."""
    if {"--load_in_4bit", "--load_in_8bit"} & set(command.flags) and not is_bitsandbytes_available():
        return "needs bitsandbytes"
    return None


@pytest.mark.parametrize("parser", sorted({command_of(shown).parser for shown in SHOWN}))
def test_shown_flags_exist(parser: str) -> None:
    """Of shortened commands, too, and of those that do not run here."""
    for shown in SHOWN:
        command = command_of(shown)
        if command.parser == parser:
            missing = [flag for flag in command.flags if not takes(parser, flag)]
            assert not missing, f"{shown.place} shows {missing} of {parser}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shared(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("README") else pytest.mark.slow) for name in RUNS]
)
def test_a_shown_command_runs(name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = command_of(RUNS[name])
    if reason := not_run(command):
        pytest.skip(reason)
    place = Workplace(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantities, "bars", partial(quantities.bars, unit=16))
    timed = create_autospec(forward_share, side_effect=share_of_parameters)
    for module in (select_for_target, pruning_rounds):
        monkeypatch.setattr(module, "forward_share", timed)
    if command.target == "recipes/demo.py":
        launched = create_autospec(subprocess.run, side_effect=partial(run_launched, place))
        monkeypatch.setattr(subprocess, "run", launched)
    if command.target == "recipes/benchmarks/convert_checkpoint.py":
        monkeypatch.setattr(subprocess, "run", create_autospec(subprocess.run, side_effect=run_code_forked))
    if command.parser == f"{CLI} lm_eval":
        without_tasks_of_the_harness(monkeypatch)
    before = set(tmp_path.rglob("*"))
    place.run(command)
    if "--output_dir" in command.flags:
        output = tmp_path / command.arguments[command.arguments.index("--output_dir") + 1]
        assert {path for path in output.rglob("*") if path.is_file()} - before


def share_of_parameters(model: PreTrainedModel, other: PreTrainedModel, *_: Any) -> float:
    """In the place of a measured time: what a busy machine measures reaches no target for certain."""
    attentions = [sum(p.numel() for n, p in each.named_parameters() if "attention" in n) for each in (other, model)]
    return attentions[0] / attentions[1]


def run_launched(place: Workplace, words: list[str], **options: Any) -> None:
    """A recipe that a command starts by `accelerate launch`, in this process."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    place.run(Command(Path(words[script]).relative_to(ROOT).as_posix(), tuple(words[script + 1 :])))


def run_code_forked(words: list[str], **options: Any) -> Done:
    """`python -c`, in a process that need not import PyTorch again."""
    assert words[1] == "-c"
    done = finished_python(*words[2:])
    assert done.returncode == 0, done.stderr
    return done


def without_tasks_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read thousands of files to know their names."""
    from lm_eval.tasks import TaskManager

    made = create_autospec(TaskManager.__init__, side_effect=partial(TaskManager.__init__, include_defaults=False))
    monkeypatch.setattr(TaskManager, "__init__", made)


def test_every_recipe_shows_a_command_and_every_command_is_there() -> None:
    targets = {command_of(shown).target for shown in SHOWN}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.py")}
    assert {target for target in targets if target.endswith(".py")} == recipes
    assert recipes == {shown.place for shown in SHOWN if shown.place.startswith("recipes/")}
    assert {"README.md", "docs/recipes.md", "docs/results.md", "docs/benchmarks.md"} <= {one.place for one in SHOWN}


def test_a_command_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    block = "A=\"--x 1\"\nfor i in 0 1; do\n  B=2 python recipes/a.py $A \\\n    '{i}' --seed $i  # why\ndone\nmv a b"
    calls = run_by_a_shell([block], tmp_path)
    assert calls == [("python", "recipes/a.py", "--x", "1", "{i}", "--seed", seed) for seed in "01"]
    with pytest.raises(AssertionError, match="unheard-of"):
        run_by_a_shell(["unheard-of --x"], tmp_path)
    with pytest.raises(AssertionError, match="UNSET"):
        run_by_a_shell(["python $UNSET"], tmp_path)


def test_a_flag_that_is_gone_is_noticed() -> None:
    assert takes("recipes/finetune_glue.py", "--task_name")
    assert not takes("recipes/finetune_glue.py", "--task")
