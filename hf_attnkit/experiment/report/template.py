"""Jinja2 for the page and the card: what comes from a run is text, never markup, in HTML and in Markdown alike."""

from __future__ import annotations

import functools
import re
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# Characters that Markdown reads; an underscore inside of a word is none.
_MARKDOWN = re.compile(r"[\\`*\[\]|#~]|(?<!\w)_|_(?!\w)")


@functools.cache
def environment(markdown: bool = False) -> Environment:
    """Templates of this folder. `autoescape` makes text of HTML; with `markdown` every value is text there, too."""
    made = Environment(
        loader=PackageLoader("hf_attnkit.experiment.report"),
        autoescape=True,
        finalize=_as_markdown if markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"breakable": breakable, "minus": minus, "fenced": fenced, "number": "{:,}".format}
    return made


def breakable(name: str) -> Markup:
    """A name that may be broken after each underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def minus(text: str) -> str:
    """Numbers with a minus sign as long as the plus sign."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def _as_markdown(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    one_line = escape(" ".join(str(value).split()), quote=False)
    return Markup(_MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line))


def fenced(text: str, language: str) -> Markup:
    """Markdown's block of code, which nothing in the text can end."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")
