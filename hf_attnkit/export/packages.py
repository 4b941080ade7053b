"""What an export needs that the package itself does not: found before anything is done, named where it is missing."""

from __future__ import annotations

import importlib.util

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise `ImportError` unless an export can be made and tried here."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an export needs {', '.join(missing)}: pip install 'hf_attnkit[export]'")
    if importlib.util.find_spec("transformers.exporters") is None:
        raise ImportError(
            "an export needs transformers.exporters, which this version of Transformers does not have: "
            "pip install 'transformers>=5.23'"
        )
