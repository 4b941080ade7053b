"""The model class `hf_attnkit` of lm-evaluation-harness: its own `hf`, loaded by `load_pretrained`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is needed ({error}): pip install 'hf_attnkit[lm-eval]'") from error

from hf_attnkit.loading import load_pretrained

TASKS = Path(__file__).parent


class _Loader:
    """Stands for an auto class where the harness calls its `from_pretrained`."""

    def __init__(self, automatic: Any) -> None:
        self._automatic = automatic

    def from_pretrained(self, path: str, **options: Any) -> Any:
        """`load_pretrained`; what the harness passes on as `None` counts as not given."""
        return load_pretrained(path, self._automatic, **{k: v for k, v in options.items() if v is not None})


@register_model("hf_attnkit")
class AttnkitLM(HFLM):
    """Arguments are those of `hf` (`pretrained`, `dtype`, `batch_size`, ...), and so are the numbers it gives."""

    AUTO_MODEL_CLASS: Any = None  # chosen by the config

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        automatic = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Loader(automatic)
        try:
            super()._create_model(*args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = automatic


def main(arguments: Sequence[str]) -> None:
    """Run `lm_eval` with this model class, and with the tasks of this package next to its own.

    Args:
        arguments: of its command line.
    """
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    if "--tasks" in given and "--include_path" not in given:
        given += ["--include_path", str(TASKS)]
    before = sys.argv
    sys.argv = ["lm_eval", *given]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
