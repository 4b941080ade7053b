"""Which products of an exported graph get weights of 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import build

from hf_attnkit.export import export_onnx
from hf_attnkit.export.int8 import _nodes

onnx_ir = pytest.importorskip("onnx_ir", reason="the extra [export] is not installed")


def test_skipped_modules_keep_their_products_in_float32(tmp_path: Path) -> None:
    model = build("bert")
    skipped = ["*.0.output.dense", "*.key", "pooler.dense"]  # the last one is a Gemm, the others are MatMul
    exported = export_onnx(model, tmp_path / "out", precision="int8", int8_skip_modules=skipped)
    saved = onnx_ir.load(tmp_path / "out" / "model.onnx")
    graph = saved.graph
    weights = {value.name for value in graph.initializers.values()}
    left = [node for node in graph if node.op_type in ("MatMul", "Gemm") and node.inputs[1].name in weights]
    layers = model.config.num_hidden_layers
    assert len(left) == layers + 2
    assert sum(node.op_type == "MatMulInteger" for node in graph) == 6 * layers + 1 - len(left)
    assert exported.precision == "int8"
    names = {node.name for node in left}
    assert set(_nodes(saved, ["*.key"])) < names and len(_nodes(saved, ["*.key"])) == layers
    with pytest.raises(ValueError, match=r"int8_skip_modules: '\*\.value' fits no module with a matrix product.*key"):
        _nodes(saved, ["*.value"])  # its product is MatMulInteger by now
