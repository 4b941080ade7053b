"""The wheel in an environment of its own: a recipe that is copied out of the checkout runs, and so does the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.recipe_runs import flags

ROOT = Path(__file__).parents[1]
RECIPE = "prune_heads_glue.py"
pytestmark = pytest.mark.slow


def run(*command: object, folder: Path) -> str:
    """Standard output; nothing of this checkout or its environment is seen."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's programs, in which nothing but the wheel with what [recipes] asks for is.

    What it asks for is linked from this environment, since to unpack PyTorch takes most of a minute.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", wheel, folder=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for file in {file for name in asked_for(wheel, "recipes") for file in top_level(metadata.distribution(name))}:
        if not (packages / file.name).exists():
            (packages / file.name).symlink_to(file)
    run(*pip, "check", folder=folder)
    return folder / "bin"


def asked_for(wheel: Path, extra: str) -> set[str]:
    """Names of the distributions that the wheel with this extra needs, and that these need."""
    (itself,) = metadata.distributions(path=[str(wheel)])
    found: set[tuple[str, str]] = set()
    waiting = [(itself, extra)]
    while waiting:
        distribution, extra = waiting.pop()
        for needed in map(Requirement, distribution.requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                new = {(canonicalize_name(needed.name), one) for one in ("", *needed.extras)} - found
                found |= new
                waiting += [(metadata.distribution(name), one) for name, one in new]
    return {name for name, _ in found}


def top_level(distribution: metadata.Distribution) -> set[Path]:
    root = Path(str(distribution.locate_file("")))
    names = {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}
    return {root / name for name in names if name != "__pycache__"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_attnkit"}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_attnkit").rglob("*") if path.is_file()}
    assert {name for name in there if "__pycache__" not in name} <= set(names)


@pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)
def test_a_copied_recipe_runs_under_accelerate_launch(installed: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "recipes" / RECIPE, tmp_path)
    script = ("-c", "from importlib.util import find_spec; print(find_spec('hf_attnkit').origin)")
    assert Path(run(installed / "python", *script, folder=tmp_path).strip()).is_relative_to(installed.parent)
    options = flags(checkpoint, Path("out"), "--prune_fraction", "0.5", "--importance", "gradient")
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--cpu")
    assert "recovered" in run(installed / "python", *launch, RECIPE, *options, folder=tmp_path)
    stages = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    assert [sum(stage["num_heads"]) for stage in stages][:3] == [8, 4, 4]
    assert {"model.safetensors", "report.html", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    assert "inspect" in run(installed / "hf-attnkit", "--help", folder=tmp_path)
