"""Weights of 8 bits in an ONNX graph, by ONNX Runtime's dynamic quantization."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

# Where the exporter notes the modules that a node was traced in, the outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("MatMul", "Gemm")


def quantized(program: Any, traced: Mapping[str, Tensor], skip_modules: Sequence[str] = ()) -> Any:
    """The graph with weights of 8 bits, one scale for each of their columns.

    Args:
        program: the graph, as Transformers' exporter keeps it.
        traced: the inputs that it was traced with.
        skip_modules: patterns of module paths; products within these modules stay as they are.

    Raises:
        ValueError: for a pattern that fits no module with a product.
    """
    from transformers.exporters import ExportFormat, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    settings = OnnxRuntimeDynamicConfig(per_channel=True, nodes_to_exclude=_nodes(program, skip_modules) or None)
    return OnnxRuntimeQuantizer(settings).quantize(program, traced, ExportFormat.ONNX)


def _nodes(program: Any, patterns: Sequence[str]) -> list[str]:
    """Names of the products that were traced in modules of these paths."""
    if not patterns:
        return []
    paths = {node.name: _paths(node) for node in program.graph if node.op_type in _PRODUCTS}
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for found in paths.values() for path in found):
            innermost = sorted({found[-1] for found in paths.values() if found})
            raise ValueError(
                f"int8_skip_modules: {pattern!r} fits no module with a matrix product; there are "
                f"{', '.join(innermost[:8])}{', ...' if len(innermost) > 8 else ''}"
            )
    names = [name for name, found in paths.items() if any(fnmatchcase(path, p) for path in found for p in patterns)]
    # ONNX Runtime first makes a Gemm a MatMul of this name, and looks for exclusions among what it has made.
    return names + [f"{node.name}_MatMul" for node in program.graph if node.op_type == "Gemm" and node.name in names]


def _paths(node: Any) -> list[str]:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    # The last one is the node's own name.
    return [scope for scope in scopes[:-1] if scope]
