"""Every recipe command that the documentation shows is one that the recipe takes."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_attnkit.experiment import run as base_run
from hf_attnkit.experiment import sweep
from hf_attnkit.experiment.training import quantized

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "recipes/README.md", "docs/recipes.md"]
TRAINING = ["finetune_glue", "uptrain_gqa_glue", "uptrain_gqa_lm", "prune_heads_glue", "swap_attention_glue"]


def commands(text: str) -> list[list[str]]:
    """Command lines of recipes that train, as a shell reads them, from the script on; shortened ones are left out."""
    shown = re.findall(r"^ *(?:python|accelerate launch)\b(?:.*\\\n)*.*", text, re.MULTILINE)
    found = []
    for command in shown:
        words = shlex.split(re.sub(r"\\+\n", " ", command))
        place = next((i for i, word in enumerate(words) if word.startswith("recipes/")), None)
        if place is not None and Path(words[place]).stem in TRAINING and words[-1] != "...":
            found.append(words[place:])
    return found


SHOWN = [
    *((page, line) for page in PAGES for line in commands((ROOT / page).read_text())),
    *((f"{name}.py", line) for name in TRAINING for line in commands((ROOT / f"recipes/{name}.py").read_text())),
]


class Parsed(Exception):
    """The arguments were taken; what follows is the run."""


@pytest.mark.parametrize(("place", "line"), SHOWN, ids=[f"{place}-{i}" for i, (place, _) in enumerate(SHOWN)])
def test_a_shown_command_is_taken(place: str, line: list[str], tmp_path, monkeypatch) -> None:
    def parsed(*arguments: object, **options: object) -> None:
        raise Parsed

    monkeypatch.chdir(tmp_path)
    Path("layers.json").write_text('{"0": "flash"}')
    monkeypatch.setattr(base_run.Run, "__init__", parsed)
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: True)
    for name in ("load_glue", "load_test", "require_place"):
        monkeypatch.setattr(sweep, name, lambda *_: None)
    monkeypatch.setattr(sweep, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_: None))
    monkeypatch.setattr(sys, "argv", [*line, "--use_cpu"])  # --bf16 alone wants a GPU
    with pytest.raises(Parsed):
        importlib.import_module(Path(line[0]).stem).main()


def test_each_page_and_script_shows_one() -> None:
    assert {place for place, _ in SHOWN} == {*PAGES, *(f"{name}.py" for name in TRAINING)}
    assert {Path(line[0]).stem for _, line in SHOWN} == set(TRAINING)
