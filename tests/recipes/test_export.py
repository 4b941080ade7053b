"""The recipe that exports: the file's metric is the model's, by the same code, and stands in its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import export
import pytest
import torch
from huggingface_hub import ModelCard
from support.recipe_runs import flags, run
from torch import nn

from hf_attnkit import load_pretrained, prune_heads
from hf_attnkit.experiment import exporting

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

only_bert = pytest.mark.parametrize("checkpoint", ["bert"], indirect=True)


@only_bert
def test_the_file_is_measured_next_to_both_models(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import AutoTokenizer

    pruned = load_pretrained(checkpoint)
    prune_heads(pruned, {0: [1], 1: [0, 2]})
    pruned.save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "pruned")
    output = tmp_path / "out"
    given = [word for word in flags(tmp_path / "pruned", output) if word != "--save_strategy" and word != "no"]
    results = run(export, monkeypatch, [*given, "--compare_with", str(checkpoint)])
    untouched, changed, exported = results["stages"]
    assert [stage["stage"] for stage in results["stages"]] == ["baseline", "changed", "exported"]
    assert untouched["num_heads"] == [4, 4] and changed["num_heads"] == exported["num_heads"] == [3, 2]
    assert exported["metrics"] == changed["metrics"] != untouched["metrics"]
    assert [stage["stage"] for stage in results["timing"]["stages"]] == ["baseline", "changed", "exported"]
    files = {path.name for path in output.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "README.md", "report.html"} <= files
    assert "model.safetensors" not in files and "progress.json" not in files
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "onnx" and {"hf_attnkit", "onnx"} <= set(card.data.tags)
    assert 'ExportedModel.from_pretrained("out", device="cpu")' in card.text and "| exported |" in card.text
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == exported["metrics"]
    assert {row["where"]: row["verdict"] for row in results["loads"]}["ONNX file"] == "yes"


@only_bert
def test_a_refusal_leaves_no_folder(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    refuse = create_autospec(exporting.export_onnx, side_effect=ValueError("cannot be exported"))
    monkeypatch.setattr(exporting, "export_onnx", refuse)
    with pytest.raises(ValueError, match="cannot be exported"):
        run(export, monkeypatch, flags(checkpoint, tmp_path / "out", "--precision", "int8"))
    assert refuse.call_args.kwargs["precision"] == "int8" and not (tmp_path / "out").exists()


class Exported:
    """In the place of an `ExportedModel` that takes two of the three inputs."""

    def __init__(self) -> None:
        metadata = type("Metadata", (), {"kwargs": ["input_ids", "attention_mask"]})()
        self.components = {"model": type("Component", (), {"metadata": metadata})()}

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.stack([input_ids.sum(1), attention_mask.sum(1)], 1).float()
        return type("Output", (), {"logits": logits})()


def test_losses_are_those_of_the_task() -> None:
    ids = torch.tensor([[3, 4], [5, 6]])
    labels = torch.tensor([0, 1])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    made = exporting.OnnxClassifier(Exported(), is_regression=False)(**given, labels=labels)
    wanted = torch.tensor([[7.0, 2.0], [11.0, 2.0]])
    assert made["logits"].equal(wanted) and made["loss"].equal(nn.functional.cross_entropy(wanted, labels))
    assert "loss" not in exporting.OnnxClassifier(Exported(), is_regression=False)(**given)
