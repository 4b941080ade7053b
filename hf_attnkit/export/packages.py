"""What an export needs that the package itself does not: found before anything is done, named where it is missing."""

from __future__ import annotations

import importlib.util

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise `ImportError` unless an export can be made and tried here."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an export needs {', '.join(missing)}: pip install 'hf_attnkit[export]'")
    try:
        from transformers.exporters import ExportedModel, OnnxRuntimeQuantizer  # noqa: F401 - whether they are there
    except ImportError as error:
        raise ImportError(
            f"an export needs transformers.exporters as Transformers 5.23 has it ({error}): "
            "pip install 'transformers>=5.23'"
        ) from error
