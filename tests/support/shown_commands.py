"""The commands that the documentation shows, as a shell reads them.

Bash itself runs the shown blocks, variables, loops and comments included, with functions in the place of the commands
that write down how they were called. A page's blocks run one after the other in one shell, as a reader would.
"""

from __future__ import annotations

import ast
import re
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What is run, and what only prepares or moves files around it.
RUN = ("python", "accelerate", "hf-attnkit")
LEFT_OUT = ("awk", "cut", "git", "make", "mv", "pip", "tail", "zip")
# What a reader fills in.
VARIABLES = {"GLUE": "path/to/glue", "MINILM": "path/to/minilm", "SMOLLM": "path/to/smollm2"}
PREAMBLE = """
set -u
record() {{ printf '%s\\0' "$@" >&3; printf '\\1\\0' >&3; }}
command_not_found_handle() {{ record unknown "$@"; }}
{functions}
{variables}
"""
INDENTED = re.compile(r"^    (?:\w+=\S+ )?(?:python|accelerate|hf-attnkit|for) .*(?:\n(?:    .*)?)*", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """A command: the file that shows it, and its words from `python`, `accelerate` or `hf-attnkit` on."""

    place: str
    words: tuple[str, ...]

    @property
    def is_shortened(self) -> bool:
        """Whether it ends in dots, which stand for arguments that are shown elsewhere."""
        return self.words[-1] == "..."


def run_by_a_shell(blocks: list[str], folder: Path) -> list[tuple[str, ...]]:
    """The calls that bash makes in these blocks; `folder` is where it runs.

    Raises:
        AssertionError: for a block that bash refuses, or a command that is neither run nor known as left out.
    """
    functions = [f'{name}() {{ record {name} "$@"; }}' for name in RUN] + [f"{name}() {{ :; }}" for name in LEFT_OUT]
    variables = [f"{name}='{value}'" for name, value in VARIABLES.items()]
    script = PREAMBLE.format(functions="\n".join(functions), variables="\n".join(variables)) + "\n".join(blocks)
    record = folder / "calls"
    done = subprocess.run(
        ["/bin/bash", "--noprofile", "--norc", "-c", f"exec 3> {record}\nPATH=/nowhere\n{script}"],
        cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = [tuple(call.split("\0")[:-1]) for call in record.read_text().split("\1\0") if call]
    record.unlink()
    unknown = sorted({call[1] for call in calls if call[0] == "unknown"})
    assert not unknown, f"{unknown} are shown as commands; say in {Path(__file__).name} whether tests run them"
    return calls


def blocks_of(path: Path) -> list[str]:
    """The shell commands of a page (its fenced blocks of bash) or of a module (the indented lines of its docstring)."""
    text = path.read_text()
    if path.suffix == ".md":
        return re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    docstring = ast.get_docstring(ast.parse(text)) or ""
    return [textwrap.dedent(block) for block in INDENTED.findall(docstring)]


def pages() -> list[Path]:
    """Every file that may show a command: the pages, the recipes, and the modules that run with `python -m`."""
    modules = [path for path in (ROOT / "hf_attnkit").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "recipes").rglob("*.py")),
        *sorted(modules),
    ]


def shown_commands(folder: Path) -> list[Shown]:
    """All of them, in the order of pages; `folder` is empty and is left so."""
    found = []
    for path in pages():
        place = path.relative_to(ROOT).as_posix()
        if blocks := blocks_of(path):
            found += [Shown(place, words) for words in run_by_a_shell(blocks, folder)]
    return found
