"""How the code is laid out: folders import downwards only, files are short, recipes hold commands and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_attnkit

PACKAGE = Path(hf_attnkit.__file__).parent
PROJECT = PACKAGE.parent
# From the top down: a folder or file imports from its own and from those after it.
ORDER = ("cli", "experiment", "export", "analysis", "conversion", "pruning", "importance", "refitting", "loading",
         "observing", "editing", "attention", "models", "common")  # fmt: skip
# The same within folders that have floors of their own.
INSIDE = {
    "attention": ("attention_backends", "swap", "proof", "choose_kinds", "cache_placement", "consistency", "dispatch",
                  "saved_kinds", "table",
                  "kinds", "kind", "kernels", "window_cache", "cache", "mask"),
    "conversion": ("convert", "checkpoints", "plan", "methods", "predicted_loss", "heads"),
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400


def imported(path: Path) -> set[str]:
    """Full names of the package's modules that a file imports, anywhere in it; not for its annotations alone."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "hf_attnkit"}


def part(path: Path) -> tuple[str, ...]:
    return tuple(path.relative_to(PACKAGE).with_suffix("").parts)


def test_every_folder_has_its_place_in_the_order() -> None:
    found = {part(path)[0] for path in FILES} - {"__init__"}
    assert found <= set(ORDER), sorted(found - set(ORDER))


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(part(path)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    for name in imported(path):
        _, *target = name.split(".")
        if not target or own == ("__init__",):
            continue
        if target[0] not in ORDER:  # the package's public names
            assert own[0] in ("cli", "experiment"), f"{own} imports {name} from the package itself"
            continue
        assert ORDER.index(own[0]) <= ORDER.index(target[0]), f"{'/'.join(own)} imports {name}, which is above it"
        floors = INSIDE.get(own[0], ())
        if own[0] == target[0] and len(target) > 1 and own[1] in floors and target[1] in floors:
            assert floors.index(own[1]) <= floors.index(target[1]), f"{'/'.join(own)} imports {name}, which is above it"


def test_files_are_in_no_circle() -> None:
    modules = {".".join(("hf_attnkit", *part(path))).removesuffix(".__init__"): path for path in FILES}
    edges = {}
    for module, path in modules.items():
        names = imported(path)
        # Importing the package itself runs it whole, whoever asks; that is no part of the layout.
        names = {name if name in modules else name.rpartition(".")[0] for name in names}
        edges[module] = names & (modules.keys() - {module, "hf_attnkit"})
    done: set[str] = set()
    while edges.keys() - done:
        ready = {module for module, names in edges.items() if module not in done and names <= done}
        assert ready, f"import circle among {sorted(edges.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("folder", ["hf_attnkit", "recipes", "tests"])
def test_files_are_short(folder: str) -> None:
    lengths = {path.relative_to(PROJECT): path.read_text().count("\n") for path in (PROJECT / folder).rglob("*.py")}
    assert not {str(path): lines for path, lines in lengths.items() if lines > LONGEST}


def test_the_top_of_the_package_is_bare() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "cli.py", "loading.py"]


def test_recipes_are_commands() -> None:
    recipes = sorted((PROJECT / "recipes").rglob("*.py"))
    assert recipes
    for path in recipes:
        text = path.read_text()
        docstring = ast.get_docstring(ast.parse(text)) or ""
        command = f"recipes/{path.relative_to(PROJECT / 'recipes').as_posix()}"
        assert command in docstring, f"{path.name} does not open with the command that runs it"
        assert 'if __name__ == "__main__":' in text, path.name
    others = {path for path in (PROJECT / "recipes").rglob("*") if path.is_file()} - set(recipes)
    assert not {path for path in others if path.suffix != ".pyc"}


def test_no_recipe_imports_another() -> None:
    names = {path.stem for path in (PROJECT / "recipes").glob("*.py")} | {"compare", "benchmarks"}
    for path in (PROJECT / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in names, f"{path.name} imports {node.module}"
            elif isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & names, path.name


def test_nothing_shipped_imports_a_recipe() -> None:
    recipes = {path.stem for path in (PROJECT / "recipes").rglob("*.py")} | {"recipes", "compare", "benchmarks"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] not in recipes, f"{path} imports the recipe {module}"


def test_no_test_file_imports_another() -> None:
    """What several need is in tests/support or a fixture of the plugin there."""
    for path in (PROJECT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                names = {name for module in modules for name in module.split(".")}
                others = {name for name in names if name.startswith("test_") or name in ("tests", "conftest")}
                assert not others, f"{path} imports {sorted(others)}"
