"""What a run writes down about itself: the data it read, the model it started from, the command that repeats it."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

# Names of folders that say nothing about the model in them.
_GENERIC = re.compile(
    r"\.*|models?|out|outputs?|main|baseline|checkpoint(-\d+)?|changed-\d+|seed-\d+|snapshots?|[0-9a-f]{40}",
    re.IGNORECASE,
)


@dataclass
class Data:
    """The data of a run.

    Attributes:
        name: short, for titles.
        hub_path: the dataset on the hub, "local", or "demo" for what this project makes itself.
        task_type: what the hub calls the task.
        config: of the dataset on the hub.
        train_split, evaluation_split: what was read, several with commas between; `None` where nothing was.
        train_examples, evaluation_examples: how many.
        language: code of ISO 639, if known.
        is_benchmark: whether it is a task of GLUE.
        note: what has to be known about the numbers, such as that a part of the dev set was measured.
    """

    name: str
    hub_path: str
    task_type: str
    config: str | None = None
    train_split: str | None = None
    evaluation_split: str | None = None
    train_examples: int | None = None
    evaluation_examples: int | None = None
    language: str | None = None
    is_benchmark: bool = False
    note: str | None = None

    def record(self) -> dict[str, Any]:
        """For results.json."""
        names = ("name", "hub_path", "config", "language", "task_type", "train_examples", "evaluation_examples",
                 "is_benchmark", "note")  # fmt: skip
        splits = {"train": self.train_split, "evaluation": self.evaluation_split}
        return {name: getattr(self, name) for name in names} | {"splits": splits}

    def __str__(self) -> str:
        """What the numbers were measured on, for titles."""
        if self.hub_path == "demo":
            where = "demo data made by this project, not GLUE"
        elif self.is_benchmark:
            where = f"{self.name}, GLUE dev set" if self.evaluation_split else f"{self.name}, GLUE"
        else:
            where = self.name if self.hub_path == "local" else f"{self.name} of {self.hub_path}"
        return f"{where}, {self.note}" if self.note else where


@dataclass
class Change:
    """What was done to the model.

    Attributes:
        kind: "pruning", "conversion", "swap", "fine-tuning", "adapters", or a recipe's own word.
        title: the same as a phrase for titles, such as "half of the attention heads removed".
        facts: numbers and names of it, as JSON holds them.
    """

    kind: str
    title: str
    facts: dict[str, Any]


def describe_model(path: str, model: PreTrainedModel) -> dict[str, Any]:
    """The model that a run started from: a short name, where it is on the hub, and its type.

    Args:
        path: a folder or a name on the hub.
        model: what was loaded from there.
    """
    kind = model.config.model_type
    folder = Path(path)
    if not folder.is_dir():
        return {"name": path.rpartition("/")[2], "path": path, "model_type": kind}
    before = _read(folder / "results.json").get("model")
    if isinstance(before, dict):  # of a run of this package
        base = before["path"] if before["path"] != "local" else before.get("base_model")
        return {"name": before["name"], "path": "local", "model_type": kind, "base_model": base}
    named = str(_read(folder / "config.json").get("_name_or_path", "")).rstrip("/")
    name = named.rpartition("/")[2]
    if not name or _GENERIC.fullmatch(name):
        name = folder.resolve().name
    if _GENERIC.fullmatch(name):
        name = type(model).__name__
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).exists()
    return {"name": name, "path": "local", "model_type": kind, "base_model": named if is_hub_name else None}


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def command(argv: Sequence[str]) -> str:
    """The command line as a user would type it: it is saved with the model and may be published.

    Without secrets, and without folders of this machine: the script is shown from `recipes/` on, and of an absolute
    path the last component.
    """
    script, *words = argv
    parts = Path(script).parts
    place = len(parts) - 1 - parts[::-1].index("recipes") if "recipes" in parts else len(parts) - 1
    shown = ["python", str(Path(*parts[place:]))]
    is_secret = False
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if is_secret or (equals and name in ("--hub_token", "--hub-token")):
            value = "..."
        elif Path(value).is_absolute() or value.startswith("~"):
            value = Path(value).name
        is_secret = word in ("--hub_token", "--hub-token")
        shown.append(f"{name}{equals}{value}")
    return shlex.join(shown)


def command_digest(argv: Sequence[str]) -> str:
    """Equal for command lines that give the same results; tells apart what `command` does not show."""
    return hashlib.sha256(json.dumps(what_counts(argv)).encode()).hexdigest()[:16]


def what_counts(argv: Sequence[str]) -> list[str]:
    """A command line without what does not change its results: the script's folder, and how it was resumed."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint", nargs="?")
    return [Path(argv[0]).name, *parser.parse_known_args(list(argv[1:]))[1]]
