"""The table of CONTRIBUTING.md is true: its files are there, and its tests fail for what is unfinished."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| an? (\w+) \| (.*) \| (.*) \|$", re.MULTILINE)
TABLE = {
    thing: (re.findall(r"`(\S+?)`", files), re.findall(r"`(\S+?)`", tests))
    for thing, files, tests in ROW.findall((ROOT / "CONTRIBUTING.md").read_text())
}
# A row of each table that nothing else knows.
UNFINISHED = """
from dataclasses import replace
from hf_attnkit.attention.table import KINDS
from hf_attnkit.conversion import METHODS as conversions
from hf_attnkit.experiment.glue.tasks import TASKS
from hf_attnkit.importance import METHODS as scores

KINDS["unfinished"] = KINDS["mha"]
scores["unfinished"] = scores["magnitude"]
conversions["unfinished"] = conversions["mean"]
TASKS["unfinished"] = replace(TASKS["cola"], name="unfinished")
"""


def test_all_kinds_of_things_are_there() -> None:
    assert list(TABLE) == ["kind", "score", "method", "model", "recipe", "task", "benchmark"]


@pytest.mark.parametrize("thing", TABLE)
def test_its_files_and_tests_exist(thing: str) -> None:
    files, tests = TABLE[thing]
    assert files and tests
    for name in files:
        path = ROOT / name
        assert any(path.parent.glob("*.py")) if path.stem == "NAME" else path.is_file(), name
    for name in tests:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), name


@pytest.mark.slow
def test_what_is_unfinished_is_noticed(tmp_path: Path) -> None:
    """In a copy of the project, with a row in each table and two recipes that open with no command."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".*", "outputs", "*.png")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / "unfinished_rows.py").write_text(UNFINISHED)
    for name in ("recipes/unfinished.py", "recipes/benchmarks/unfinished.py"):
        (copy / name).write_text('"""A recipe."""\n')
    tests = sorted({test for thing, (_, tests) in TABLE.items() if thing != "model" for test in tests})
    environment = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "unfinished_rows", "-n", "0", "-rA", "-p", "no:cacheprovider", *tests],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    failed = re.findall(r"^FAILED ([^\s\[]+)", done.stdout, re.MULTILINE)
    assert sorted(set(failed)) == tests, done.stdout[-5000:] + done.stderr[-2000:]
    # By what is unfinished, not by the copy.
    for line in re.findall(r"^FAILED (\S+\[\S+\])", done.stdout, re.MULTILINE):
        assert "unfinished" in line
