"""The mark `slow` is on what takes long, and each part has tests without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.slow import FEW_CASES, FEW_STEPS, mark, only_if_slow, runs_a_recipe
from torch import nn, zeros
from transformers import Trainer, TrainingArguments

import hf_attnkit

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("test_*.py"))


class Learner(nn.Linear):
    def forward(self, x, labels):
        return {"loss": (super().forward(x) - labels).square().mean()}


def train(steps: int, folder: Path) -> None:
    data = [{"x": zeros(2), "labels": zeros(1)}] * 8
    options = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    Trainer(Learner(2, 1), TrainingArguments(str(folder), max_steps=steps, **options), train_dataset=data).train()


def test_a_process_needs_the_mark() -> None:
    with pytest.raises(pytest.fail.Exception, match="test_a_process_needs_the_mark starts a Python process: mark it"):
        subprocess.run([sys.executable, "-c", "pass"])


def test_training_needs_the_mark(tmp_path: Path) -> None:
    train(FEW_STEPS, tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"trains 9 steps, more than 8: mark it slow"):
        train(FEW_STEPS + 1, tmp_path)


@pytest.mark.slow
def test_with_the_mark_both_run(tmp_path: Path) -> None:
    train(FEW_STEPS + 1, tmp_path)
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    only_if_slow("does anything")


def test_what_takes_a_recipes_checkpoint_is_marked(request: pytest.FixtureRequest) -> None:
    assert not runs_a_recipe(request.node)
    assert runs_a_recipe(SimpleNamespace(fixturenames=["tmp_path", "text_checkpoint"]))


@pytest.mark.parametrize("number", [FEW_CASES, 100])
def test_of_many_cases_few_are_fast(number: int) -> None:
    marked: list[list[int]] = []
    for _ in range(2):
        marked.append([])
        mark([
            SimpleNamespace(nodeid=f"tests/test_a.py::test_b[{case}-[]]", add_marker=lambda _, case=case:
                            marked[-1].append(case)) for case in range(number)
        ])  # fmt: skip
    assert marked[0] == marked[1] and len(set(marked[0])) == number - FEW_CASES


def functions(path: Path) -> list[tuple[ast.FunctionDef, bool]]:
    """The test functions of a file, and whether they are slow by their own mark, their file's or a fixture."""
    tree = ast.parse(path.read_text())
    whole = any("pytestmark = pytest.mark.slow" in ast.unparse(node) for node in tree.body)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [
        (node, whole or "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
         or runs_a_recipe(SimpleNamespace(fixturenames=[argument.arg for argument in node.args.args])))
        for node in found
    ]  # fmt: skip


@pytest.mark.parametrize("part", sorted({path.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS}))
def test_every_part_has_fast_tests(part: str) -> None:
    """Those of the recipes, which run on checkpoints, are the shown commands of test_documented_commands.py."""
    slow = [slow for path in FILES if path.is_relative_to(TESTS / part) for _, slow in functions(path)]
    assert slow.count(False) >= 3


def test_fast_tests_use_every_public_name() -> None:
    """So `make test-lowest`, which runs these, calls all that is public."""
    used: set[str] = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        slow = {node for function, is_slow in functions(path) if is_slow for node in ast.walk(function)}
        imported = {node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
        for node in ast.walk(tree):
            if node not in slow and node not in imported:
                used |= {getattr(node, "id", None), getattr(node, "attr", None)} - {None}
    assert not set(hf_attnkit.__all__) - used
