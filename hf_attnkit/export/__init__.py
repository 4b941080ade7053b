"""Bring a model, changed or not, to where it is used: an ONNX file that was compared with it."""

from hf_attnkit.export.onnx_file import LOWEST_OPSET, PRECISIONS, Exported, export_onnx

__all__ = ["LOWEST_OPSET", "PRECISIONS", "Exported", "export_onnx"]
