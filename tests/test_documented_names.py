"""What the documentation has to name, because a table or a folder has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_attnkit.conversion import METHODS
from hf_attnkit.experiment.glue.tasks import TASKS

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.py"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_conversion_method_is_defined(method: str) -> None:
    assert f"`{method}`" in page("conversion.md") or f'"{method}"' in page("conversion.md")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_shown_in_the_docs(recipe: str) -> None:
    """With its path, on any page, or as a target of the Makefile."""
    assert any(
        recipe in path.read_text() for path in [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")]
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_named(task: str) -> None:
    assert re.search(rf"\b{task}\b", page("recipes.md"))
