"""The metadata says what is installed and tried: bounds, pins, and the environments of the Makefile."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def requirements(*lists: list[str]) -> list[Requirement]:
    found = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(PROJECT["dependencies"], EXTRAS["recipes"]), ids=str)
def test_the_lowest_version_allowed_is_the_one_that_is_tried(requirement: Requirement) -> None:
    (bound,) = [one for one in requirement.specifier if one.operator == ">="]
    assert pins("constraints-lowest.txt")[canonicalize_name(requirement.name)] == Version(bound.version)


@pytest.mark.parametrize(
    "requirement",
    requirements(PROJECT["dependencies"], *(lines for name, lines in EXTRAS.items() if name != "quantized")),
    ids=str,
)
def test_what_development_installs_is_pinned_and_allowed(requirement: Requirement) -> None:
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lowest_python_allowed_is_the_one_that_is_tried() -> None:
    (python,) = re.findall(r"^PYTHON \?= python(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={python}")
    assert sys.version_info[:2] >= tuple(map(int, python.split(".")))


def test_ci_and_commits_run_the_makefile() -> None:
    """No list of checks but the Makefile's."""
    assert re.search(r"^make .*\btest$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", hooks) == ["make lint"]
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
